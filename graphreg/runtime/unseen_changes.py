"""Warns at a call of a rewritten module about changes of the model that the module does not follow: of hooks, flags and wrappers.

The graph contains the operations of the modules that it opens, as the model's code did them when it was traced. So it runs no hook that is
registered on such a module later, and its code does not read such a module's flags again: ``gradient_checkpointing_enable()`` of
transformers, and ``set_grad_checkpointing()`` of timm, set flags. A model that is regularized in place follows them, or refuses the call.
A checkpoint wrapper around a module that a graph opens is never called, so backward recomputes nothing, and the user would take the memory
to be saved. It is looked for at the first call alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from graphreg.blocks.homes import inlined, opened_paths
from graphreg.blocks.placed_block import is_block
from graphreg.errors import listed, warn
from graphreg.ir.module_record import state_of
from graphreg.runtime.sharding import module_of, named_modules
from graphreg.torch_internals.checkpointing import checkpoint_wrapped
from graphreg.torch_internals.hooked_calls import is_users_hook
from graphreg.torch_internals.modules import CALL_HOOKS, modules_by_path, own_hooks


class UnseenChanges:
    """Which modules that a graph opens had no hooks when the module was made, and their public flags.

    Attributes:
        hooks: The empty dicts of hooks.
        flags: The namespace, name and value of each flag.
        paths: The paths of the modules, by the ids of these dicts and namespaces.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        """Look at a rewritten module. Without one, the record is empty, as in a copy; a copied module makes a record of its own."""
        self.hooks: list[dict[int, Any]] = []
        self.flags: list[tuple[dict[str, Any], str, bool]] = []
        self.paths: dict[int, str] = {}
        if module is None or (state := state_of(module)) is None:
            return
        ours, models = modules_by_path(module), modules_by_path(state.root[0] if state.root else module)
        inside = inlined(state.graphs.values(), models.keys())
        for path in (path for path in ours if path in inside and path not in state.blocks):
            for name in CALL_HOOKS:
                if not (hooks := vars(ours[path])[name]):
                    self.hooks.append(hooks)
                    self.paths[id(hooks)] = path
        for path in (path for path in models if not path or path in inside):
            space = vars(models[path])
            kinds = [each for each in reversed(type(models[path]).__mro__) if each not in (nn.Module, object)]
            of_class = {name: value for kind in kinds for name, value in vars(kind).items() if _is_flag(name, value)}
            # An object may replace a flag of its class by one of its own.
            self.flags += [(space, name, value) for name, value in (of_class | space).items() if _is_flag(name, value)]
            self.paths[id(space)] = path

    def __reduce__(self) -> tuple[Any, ...]:
        return UnseenChanges, ()

    def look(self) -> None:
        """Warn about each change since the last look. This runs at each call, so it compares, and does no more if nothing has changed."""
        if any(self.hooks):
            self._look_at_hooks()
        for space, name, value in self.flags:
            if space.get(name, value) is not value:
                self._look_at_flags()
                break

    def _look_at_hooks(self) -> None:
        hooked = [hooks for hooks in self.hooks if any(is_users_hook(hook) for hook in own_hooks(hooks))]  # FSDP2's are refused
        self.hooks = [hooks for hooks in self.hooks if not hooks]
        if paths := list(dict.fromkeys(self.paths[id(hooks)] for hooks in hooked)):
            warn(
                f"{listed(paths, 3)} got a hook after graphreg.regularize, and the hook does not run when the regularized module is "
                f"called: its graph contains the operations of {paths[0]}, and does not call it. Make such modules blocks that are called: "
                f"graphreg.regularize(model, ..., blocks={paths[0]!r}), unless they compute nothing; or register the hook on a layer that "
                "the graph calls, such as an nn.Linear."
            )

    def _look_at_flags(self) -> None:
        if not (changed := [flag for flag in self.flags if flag[0].get(flag[1], flag[2]) is not flag[2]]):
            return  # another thread has said it
        self.flags = [flag for flag in self.flags if not any(flag is each for each in changed)]  # said once
        said = [f"{self.paths[id(space)]}.{name}".lstrip(".") for space, name, _ in changed]
        warn(
            f"{listed(said, 3)} changed after graphreg.regularize, and the regularized module does not follow: it runs the operations that "
            f"the model had with {changed[0][1]}={changed[0][2]}. Change it before graphreg.regularize, or use graphreg.regularize_, whose "
            "models follow at the next call."
        )


def _is_flag(name: str, value: object) -> bool:
    return type(value) is bool and not name.startswith("_") and name != "training"


def warn_of_uncalled_checkpoints(rules: Any) -> None:
    """Warn if the emitted code never calls a checkpoint wrapper. ``rules``: the container of the module's runtime modules."""
    rules.is_uncalled = False
    module = module_of(rules.number)
    if module is None or (state := state_of(module)) is None:
        return
    wrapped = [path for path, inner in named_modules(module) if (within := checkpoint_wrapped(inner)) is not None and not is_block(within)]
    within_graph = opened_paths(state.graphs.values(), wrapped) if wrapped else ()
    if lost := [path for path in wrapped if path in within_graph]:
        warn(
            f"checkpoint_wrapper was put around {listed(lost, 3)}, and the emitted code runs the operations inside without calling the "
            "wrapper, so backward recomputes nothing there and no memory is saved. Make what you wrap a block that is called: "
            f"graphreg.regularize(model, ..., blocks={lost[0]!r}), with a selector of all such modules; then wrap the blocks of the result."
        )
