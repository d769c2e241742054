"""Blocks: makes modules that ``blocks=`` names stay modules that are called, while the flat graph of the whole model stays the truth.

``outlined`` is called while the forwards of a rewritten module are generated. ``homes.py`` finds the block call that each node belongs to,
``outline.py`` makes a graph for each call of a block, and ``block.py`` has the objects that stand for the blocks.
"""

from graphreg.blocks.block import BLOCK, Block, block_at, is_sharded, original, with_blocks
from graphreg.blocks.homes import OUTSIDE_BLOCKS, opened
from graphreg.blocks.install import outlined

__all__ = ["BLOCK", "OUTSIDE_BLOCKS", "Block", "block_at", "is_sharded", "opened", "original", "outlined", "with_blocks"]
