"""Draws a model with its regularizers: as SVG, PNG, Graphviz text or an interactive HTML page, or as a networkx graph.

Open ``draw.py`` first. The steps are: ``view.py`` finds the graph of whatever was given,
``graph.py`` converts it to networkx, ``scene.py`` chooses what is drawn and groups it by module,
``layout.py`` places it, and ``render.py`` or ``html.py`` writes the file.
"""
