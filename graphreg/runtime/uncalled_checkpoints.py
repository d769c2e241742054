"""Warns at the first call of a rewritten module if a checkpoint wrapper is around a module whose operations the graph runs itself.

Such a wrapper is never called, so backward recomputes nothing, and the user would take the memory to be saved. The wrapper is put there
after the module was made, so only a call can notice it. Later calls do not look again.
"""

from __future__ import annotations

from typing import Any

from graphreg.blocks.homes import opened
from graphreg.blocks.placed_block import is_block
from graphreg.errors import listed, warn
from graphreg.ir.module_record import state_of
from graphreg.runtime.sharding import module_of, named_modules
from graphreg.torch_internals.checkpointing import checkpoint_wrapped


def warn_of_uncalled_checkpoints(rules: Any) -> None:
    """Warn if the emitted code never calls a checkpoint wrapper. ``rules``: the container of the module's runtime modules."""
    rules.is_uncalled = False
    module = module_of(rules.number)
    if module is None or (state := state_of(module)) is None:
        return
    wrapped = [path for path, inner in named_modules(module) if (within := checkpoint_wrapped(inner)) is not None and not is_block(within)]
    within_graph = opened(state.graphs.values(), wrapped) if wrapped else ()
    if lost := [path for path in wrapped if path in within_graph]:
        warn(
            f"checkpoint_wrapper was put around {listed(lost, 3)}, and the emitted code runs the operations inside without calling the "
            "wrapper, so backward recomputes nothing there and no memory is saved. Make what you wrap a block that is called: "
            f"graphreg.regularize(model, ..., blocks={lost[0]!r}), with a selector of all such modules; then wrap the blocks of the result."
        )
