"""Keeps the modules that ``blocks=`` selects as modules that the rewritten module calls.

Plan, rewrite, check and pickle use the flat graph of the whole model, which does not contain these calls. When the forwards of a rewritten
module are generated, ``outlined`` makes the graphs that contain these calls. ``homes.py`` finds the block calls that each node belongs to,
``outline.py`` makes a graph for each call of a block, and ``block.py`` has the objects that stand for the blocks.
"""

from graphreg.blocks.block import BLOCK, Block, block_at, is_sharded, original, with_blocks
from graphreg.blocks.homes import OUTSIDE_BLOCKS, opened
from graphreg.blocks.install import outlined

__all__ = ["BLOCK", "OUTSIDE_BLOCKS", "Block", "block_at", "is_sharded", "opened", "original", "outlined", "with_blocks"]
