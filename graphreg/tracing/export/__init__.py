"""The export front end: torch.export with every operation recorded in the words of torch.fx."""
