"""What optimizers take, found by selectors: ``param_groups``, ``named_parameters``, and optimizer states that load by name.

Open ``param_groups.py`` first. ``parameters.py`` finds the parameters of a model by selector, without a trace;
``standard_decay.py`` has the usual rule for weight decay, ``levels.py`` the depth of each parameter, and ``load_by_name.py`` the hook for
states.
"""
