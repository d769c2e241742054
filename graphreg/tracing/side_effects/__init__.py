"""Side effects of a forward: finds the state that a trace changed, restores it, and refuses changes that the next call would read."""
