"""The symbolic front end: torch.fx with graphreg's tracer."""
