"""The random numbers of splices. Each is a function of a key and an element's index, so forward and backward see the same mask.

Open ``noise.py`` first: it has the keys, and ``Noise``, from which a regularizer draws. ``hash.py``
has the integer arithmetic of a draw. ``operators.py`` has the same draws as custom operators, which
Inductor lowers, and ``triton_kernels.py`` has them as kernels for eager code on a GPU.
``window.py`` says where a part of a value lies in the whole value, if several ranks divide the
value.
"""
