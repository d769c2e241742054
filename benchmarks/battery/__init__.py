"""The battery: the random streams under every test of ``dieharder -a``, and the tables of what came of it."""
