"""Wrappers for all private names of torch that graphreg uses. No other package of graphreg uses a private name of torch.

Some names are torch's own functions under a new name. graphreg calls these functions too often for a slower Python wrapper, or Dynamo must
trace or recognize them.

After an upgrade of torch, run ``tests/torch_internals``. It tests each wrapper on a tiny example, and a failure names the wrapper to
repair.
"""
