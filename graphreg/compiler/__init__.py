"""What graphreg does to make a rewritten module compile well with torch.compile.

The room has extra passes on Inductor's graphs, the decision which splices backward recomputes, a
custom operator that runs recurrent layers, and the compiler settings that affect random operations.
Open ``inductor_passes.py`` first: while Dynamo traces a penalty, its passes are added to Inductor's
options for this one graph.
"""
