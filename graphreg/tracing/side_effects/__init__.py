"""What a forward changes beside its values: found, put back, and refused where the next call would read it."""
