"""Nested tuples, lists and dicts, taken apart as torch itself does it, with the classes that users have made known to torch.

graphreg needs torch's own, under no public name of torch's: a user's output classes are registered there, and torch.export reads it.
"""

from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import _register_namedtuple as register_namedtuple
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils._pytree import treespec_leaf as treespec_leaf

__all__ = ["TreeSpec", "register_namedtuple", "tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten", "treespec_leaf"]
