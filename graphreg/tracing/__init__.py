"""Traces a model: turns an nn.Module into graphs whose values have names. The model itself stays unchanged.

Open ``trace.py`` first: its function ``trace`` chooses a front end, ``symbolic/`` (torch.fx) or
``export/`` (torch.export).
"""
