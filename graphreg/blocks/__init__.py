"""Keeps the modules that ``blocks=`` selects as modules that the rewritten module calls.

Plan, rewrite, check and pickle use the flat graph of the whole model, which does not contain these calls. When the forwards of
a rewritten module are generated, ``outlined`` makes the graphs that contain these calls. ``homes.py`` finds the block calls of each node,
``outline.py`` makes a graph for each call of a block, and ``block.py`` has the objects that stand for the blocks. In a model
that is regularized in place, the model's own modules are the blocks (``placed_block.py``).
"""

from graphreg.blocks.block import BLOCK, CALLS, Block, block_at, is_sharded, original, with_blocks
from graphreg.blocks.homes import OUTSIDE_BLOCKS, opened
from graphreg.blocks.install import outlined
from graphreg.blocks.placed_block import check_class, is_block, is_placed, leave, new_owner, place, unwrapped_block

__all__ = [
    "BLOCK", "CALLS", "OUTSIDE_BLOCKS", "Block", "block_at", "check_class", "is_block", "is_placed", "is_sharded", "leave", "new_owner",
    "opened", "original", "outlined", "place", "unwrapped_block", "with_blocks",
]  # fmt: skip
