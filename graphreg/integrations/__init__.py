"""Ready to use with training libraries: callbacks that save the noise and the strengths, log the penalties, and set their scale.

``transformers.py`` and ``lightning.py`` have a callback each, ``accelerate.py`` an object for checkpoints. ``parts.py`` is what they share.
Import from the file of the library that you use: ``from graphreg.integrations.transformers import RegularizerCallback``.
"""

from graphreg.integrations.parts import Parts

__all__ = ["Parts"]
