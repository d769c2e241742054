"""torch's own pytree functions, which flatten and rebuild nested tuples, lists, dicts and objects of registered classes.

torch has no public names for these functions. graphreg needs torch's implementation, because users register their output classes with
torch, and because torch.export uses this implementation.
"""

from torch.utils._pytree import SUPPORTED_NODES as SUPPORTED_NODES
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import _register_namedtuple as register_namedtuple
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils._pytree import treespec_leaf as treespec_leaf

__all__ = [
    "SUPPORTED_NODES", "TreeSpec", "register_namedtuple", "tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten", "treespec_leaf",
]  # fmt: skip
