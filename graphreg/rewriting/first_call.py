"""Proves the graph of a rewritten module at its first eager call, if no inputs were at hand when the model was traced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graphreg.errors import OtherInputs
from graphreg.ir.module_record import RULES, state_of
from graphreg.ir.serialize import copied_graph
from graphreg.rewriting.strip import strip_graph
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.hosts import graphs_of, in_place_host, rules_of
from graphreg.torch_internals.functorch import innermost_transform
from graphreg.torch_internals.fx import is_traced
from graphreg.torch_internals.torch_modes import is_exporting, jit_trace, operator_modes
from graphreg.tracing.fake_inputs import Arguments
from graphreg.tracing.proof.proof import NO_INPUTS, PROVABLE, TRACED, Claim, NotTheModel, Proving, proof_key, proof_keys, prove

log = logging.getLogger("graphreg")
# A proof lends the model copies of its buffers. First calls of other threads wait: they would take the copies for the model's own.
_ONE_AT_A_TIME = threading.RLock()
_LATER = "the first call of %s in %s mode runs within a tracer or a transform, and proves nothing; the next eager call proves the graph"


def is_eager() -> bool:
    """Return whether code runs on plain tensors, and neither a tracer nor a transform of torch.func nor a dispatch mode is active."""
    return innermost_transform() is None and not operator_modes() and jit_trace() is None and not is_traced() and not is_exporting()


def prove_call(module: RewrittenModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Prove the graph of the present mode on the arguments of a call, unless that has been done or cannot be done.

    If the forward depends on autocast, the graph is proved without it and with each of its dtypes.

    Raises:
        NotTheModel: The graph does not give what the model gives.
    """
    with _ONE_AT_A_TIME:
        _prove_call(module, args, kwargs)


def _prove_call(module: RewrittenModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    rules, mode = rules_of(module), "train" if module.training else "eval"
    if not may_be_proved(module, mode):  # perhaps because another thread has proved it meanwhile
        return
    model = _model_of(module)
    if isinstance(model, str):
        rules.unproved[proof_key(mode, rules.asks_autocast)] = model
        return
    if placed := [name for name, inner in model.named_modules() if (host := in_place_host(inner)) and (mode == "train" or host.in_eval)]:
        what = type(model).__name__ + (f".{placed[0]}" if placed[0] else "")
        raise NotTheModel(
            f"{what} was regularized in place (graphreg.regularize_) after graphreg.regularize, so its result has these regularizers, too, "
            "and the graph of this module, which was traced without inputs, cannot be compared with it. Give graphreg.regularize "
            "example_inputs, or call the module once before graphreg.regularize_; graphreg.strip_ takes the regularizers out again."
        )
    try:
        prove_mode(module, model, mode, (tuple(args), dict(kwargs)), Proving((mode,), at_call=True))
    except NotTheModel as error:
        if isinstance(error.__cause__, OtherInputs):  # the graph is not for these inputs, and the call says so itself
            return
        if proof_keys(mode, rules.asks_autocast) - rules.unproved.keys():  # it was right under another one
            raise NotTheModel(
                f"{error} The forward asks for autocast, or switches it on or off, and the graph was traced where autocast is not as in "
                "this call. Call regularize where it is as in this call, with example_inputs."
            ) from error
        raise NotTheModel(
            f"{error} The model was traced without example_inputs. With them, graphreg also tries torch.export, which can trace more. If "
            "the model was changed after it was regularized (an attribute, its configuration), that is the cause: regularize it again."
        ) from error


def may_be_proved(module: RewrittenModule, mode: str) -> bool:
    """Return whether a call can prove the graph of a mode, and no earlier one has. If only a later call can, note and log that."""
    rules = rules_of(module)
    key, unproved = proof_key(mode, rules.asks_autocast), rules.unproved
    if unproved.get(key) not in PROVABLE:
        return False
    if is_eager():
        return True
    if unproved[key] == NO_INPUTS:
        log.info(_LATER, type(module).__name__, mode)
    unproved[key] = TRACED
    return False


def prove_mode(module: RewrittenModule, model: nn.Module, mode: str, call: Arguments, proving: Proving) -> None:
    """Prove a module's graph of one mode on the arguments of a call, and note the result. ``model``: the model that it was made from."""
    rules, reasons = rules_of(module), prove(claim_of(module, model, mode), call, proving)
    with proving.around():
        key = proof_key(mode, rules.asks_autocast)
    kept = {name: why for name, why in rules.unproved.items() if name != key}
    rules.unproved = kept | ({key: reasons[mode]} if reasons else {})


def claim_of(module: RewrittenModule, model: nn.Module, mode: str) -> Claim:
    """Return the claim that a module's graph of one mode, without the additions, computes what ``model`` computes."""
    graph = copied_graph(graphs_of(module).get("both") or graphs_of(module)[mode])
    strip_graph(graph)
    record = rules_of(module).build_record
    assert record is not None
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"} & vars(module).keys() - vars(model).keys()
    return Claim(model, {mode: graph}, {name: vars(module)[name] for name in read}, record.specialized, record.front_end)


def _model_of(module: RewrittenModule) -> nn.Module | str:
    """Return the model that a module was made from; if there is none to compare with, the reason."""
    state = state_of(module)
    if state is None or not state.root:
        return "the module is a copy or was unpickled, and the model is not there"
    if rules_of(module).is_edited:
        return "the graph was edited after the model was regularized"
    model = state.root[0]
    ours = {name: child for name, child in module._modules.items() if name != RULES and name not in state.blocks}
    if any(model._modules.get(name) is not child for name, child in ours.items()):
        return "modules of the model were replaced after it was regularized"
    return model
