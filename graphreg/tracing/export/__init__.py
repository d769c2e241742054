"""The export front end: traces a model with torch.export and records each operation in the form that torch.fx would give it."""
