"""Makes a rewritten module call the modules that ``blocks=`` selects, such as the layers of a transformer, instead of inlining them.

Plan, rewrite, check and pickle use the flat graph. In it, all modules are inlined, except those that the tracer does not enter, such as an
``nn.Linear``. When the forwards of a rewritten module are generated, ``outlined`` (``install.py``) turns each flat graph into a graph that
calls the blocks, and a graph for each call of a block. ``homes.py`` finds the block calls that a node belongs to, and ``outline.py`` makes
the graphs. A rewritten module has an object of its own for each block (``block.py``). In a model that is regularized in place, the model's
own modules are the blocks (``placed_block.py``).
"""
