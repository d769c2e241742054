"""Handles side effects of a forward: finds and restores the state that a trace changed, and refuses changes that the next call reads."""
