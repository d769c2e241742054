"""Proves on inputs at hand that a traced graph computes what the model computes. Open ``proof.py`` first."""
