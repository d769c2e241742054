"""Side effects of a forward: finds what a trace changed, restores it, and refuses changes that the next call would read."""
