"""torch's own pytree functions, which flatten and rebuild nested tuples, lists, dicts and objects of registered classes.

torch has no public names for these functions. graphreg needs torch's implementation, because users register their output classes with
torch, and because torch.export uses this implementation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._pytree import SUPPORTED_NODES as SUPPORTED_NODES
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import _register_namedtuple as register_namedtuple
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils._pytree import treespec_leaf as treespec_leaf

__all__ = [
    "SUPPORTED_NODES", "TreeSpec", "register_namedtuple", "tree_flatten", "tree_leaves", "tree_map_only", "tree_tensors", "tree_unflatten",
    "treespec_leaf",
]  # fmt: skip


def tree_tensors(tree: Any) -> list[torch.Tensor]:
    """Return the leaves of a tree that are tensors."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def tree_map_only(kind: Any, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree with ``function`` applied to its leaves of a type. A ``torch.Size`` is a leaf; torch would make a tuple of it."""
    return _pytree.tree_map_only(kind, function, tree, is_leaf=lambda value: isinstance(value, torch.Size))
