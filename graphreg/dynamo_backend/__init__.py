"""``graphreg.backend``: a backend of torch.compile that regularizes every graph that Dynamo captures of a model.

Open ``options.py`` first, then ``backend.py``: a ``Backend`` follows each call of the model through its graphs. ``subgraph.py`` processes
one captured graph: ``capture.py`` labels it, ``planning/`` and ``rewriting/`` regularize it, and ``emit.py`` turns it back into
Dynamo's form, in which parameters are inputs. ``model_call.py`` computes the penalties over all graphs of a call. ``all_graphs.py`` checks
the selectors over all graphs, and makes the report.
"""
