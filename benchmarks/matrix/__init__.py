"""The matrix: the tests, the names of twenty models and the random streams under each Python and torch that graphreg supports."""
