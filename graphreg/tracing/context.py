"""What a forward asks of its surroundings (``torch.is_grad_enabled()``): answered while it is traced, and asserted where it decides.

A graph has one answer in it. So a forward that asks is traced with the other answer too. Where that gives another graph, a submodule
that asks is kept whole, and asks at each call; where the model itself asks, its graph asserts the answer.

Not asserted is what every ordinary run answers alike (``torch.jit.is_scripting()``, ``torch.compiler.is_compiling()``,
``torch.onnx.is_in_onnx_export()``), and ``torch.is_autocast_enabled()``, which decides on precision alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect

from graphreg.errors import GraphRegError
from graphreg.ir import label_site
from graphreg.torch_internals import Changes
from graphreg.tracing.symbolic.proxies import FOREIGN

CHECKPOINTS = "it checkpoints activations, which a trace would lose"  # refused by both front ends
ASKED: dict[str, Callable[[], Any]] = {
    name: getattr(torch, name)
    for name in ("is_grad_enabled", "is_inference_mode_enabled", "are_deterministic_algorithms_enabled", "get_default_dtype")
}
# Under torch.export these say True, to libraries that were written for it; a model of the user's own goes the way that it goes in use.
_COMPILING = (torch.compiler.is_compiling, torch.compiler.is_exporting, torch.compiler.is_dynamo_compiling)
Answers = Mapping[str, Any]  # by the name of what is asked
Asked = dict[str, str]  # by the path of a module whose mode is asked for, the path of another module that asks


@has_side_effect
def surrounded(name: str, expected: Any) -> None:
    """Raises unless what the forward asks of its surroundings has the answer that it was traced with."""
    now = getattr(torch, name)()
    if now != expected:
        raise GraphRegError(
            f"the model's forward asks torch.{name}() and goes by the answer. It was traced where that is {expected}; here it is {now}. "
            f"Call it where it is {expected}, or move what asks into a submodule of its own, which graphreg then keeps whole."
        )


class Questions:
    """What a forward asked, by the module whose code asked; ``answers`` are given in the place of torch's own.

    ``path``: of the module whose code runs, None where no code runs that is traced; ``refusal``: ends the trace of that module.
    """

    def __init__(self, path: Callable[[], str | None], answers: Answers, refusal: type[BaseException] = RuntimeError) -> None:
        self.asked: dict[str, dict[str, None]] = {}  # by what is asked, the paths of modules
        self.modes = Asked()
        self._path, self._answers, self._refusal, self._thread = path, answers, refusal, threading.get_ident()

    @contextmanager
    def heard(self, model: nn.Module, places: Iterable[dict[str, Any]]) -> Iterator[None]:
        """Meanwhile the model's code asks here: ``places`` are the globals that it may have the functions in."""
        changed = [
            (place, name, function) for place in (vars(torch), vars(torch.compiler), *places) for name, function in self._found(place)
        ]
        with Changes() as changes, changes:
            for place, name, function in changed:
                changes.put(place, name, self._ask(function))
            changes.put(nn.Module, "training", self._mode({id(vars(module)): name for name, module in model.named_modules()}))
            yield

    def _mode(self, paths: Mapping[int, str]) -> property:
        """In the place of ``training``, which is an attribute of each module: notes who asks for another's.

        ``paths``: of modules, by their attributes, which torch.export has in other objects.
        """

        def get(module: nn.Module) -> Any:
            own = vars(module)
            if "training" not in own:
                raise AttributeError(f"{type(module).__name__!r} object has no attribute 'training'")
            asks, path = self._running(), paths.get(id(own))
            if asks is not None and path and path != asks and not _by_foreign():
                self.modes[path] = asks
            return own["training"]

        def set_(module: nn.Module, mode: bool) -> None:
            own = vars(module)
            if self._running() is not None and id(own) in paths and own.get("training") != mode:
                raise self._refusal(f"it sets the mode of {paths[id(own)] or 'the model'}, which a graph cannot do")
            own["training"] = mode

        return property(get, set_)

    def _running(self) -> str | None:
        return self._path() if threading.get_ident() == self._thread else None

    def _found(self, place: dict[str, Any]) -> list[tuple[str, Callable[[], Any]]]:
        functions = set(map(id, (*ASKED.values(), *_COMPILING)))
        return [(name, value) for name, value in place.items() if id(value) in functions]

    def _ask(self, function: Callable[[], Any]) -> Callable[[], Any]:
        name = next((name for name, each in ASKED.items() if each is function), None)

        def ask() -> Any:
            frame = sys._getframe(1)
            if str(frame.f_globals.get("__name__", "")).partition(".")[0] in FOREIGN:
                return function()
            if name is None:
                return function() and "-packages" in frame.f_code.co_filename
            self.asked.setdefault(name, {})[self._path() or ""] = None
            return self._answers.get(name, function())

        return ask


def _by_foreign() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] in FOREIGN


def other(name: str) -> Any:
    """An answer that the surroundings do not give."""
    now = ASKED[name]()
    return (torch.float32 if now is torch.float64 else torch.float64) if name == "get_default_dtype" else not now


def settled(graph: fx.Graph, asked: Mapping[str, Iterable[str]], same: Callable[[Answers], bool], leaves: dict[str, str]) -> None:
    """Assert in the graph what decides, or have the submodules that ask kept whole. ``same``: whether a trace with these answers gives
    the same graph."""
    for name, paths in asked.items():
        if same({name: other(name)}):
            continue
        own = [path for path in paths if path not in ("", *leaves)]
        if own and name != "get_default_dtype":  # a dtype is one for a whole program
            leaves.update(dict.fromkeys(own, f"it asks torch.{name}() at each call"))
        else:
            _assert(graph, name)


def _assert(graph: fx.Graph, name: str) -> None:
    behind = next((node for node in graph.nodes if node.op != "placeholder"), graph.output_node())
    with graph.inserting_before(behind):
        label_site(graph.call_function(surrounded, (name, ASKED[name]())), "")


def recorded(graph: fx.Graph) -> bool:
    """Whether the graph must run with gradients on, for it asserts that."""
    return any(node.target is surrounded and node.args == ("is_grad_enabled", True) for node in graph.nodes)
