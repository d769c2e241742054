"""What runs when a rewritten module is called: the module class itself, and the runtime modules that its graph calls.

Open ``rewritten_module.py`` first: ``RewrittenModule`` is the class of the module that ``graphreg.regularize`` returns. Each addition
to its graph is a call of a *runtime module*, a small ``nn.Module`` registered under ``graphreg_rules``. ``runtime_module.py`` has the
base class of runtime modules, and ``splice.py`` the class for splices. ``noise_keys.py`` has the runtime module that returns the keys of
the noise, and ``clock.py`` that of schedules; ``penalty.py``, ``derivative_penalty.py``, ``stateful.py``, ``dropout.py`` and ``attach.py``
have the other runtime modules. ``controls.py`` and ``sampling.py`` have the functions that a user calls on the finished module.
"""
