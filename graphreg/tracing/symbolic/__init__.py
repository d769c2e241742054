"""The symbolic front end: traces a model with torch.fx and graphreg's tracer."""
