"""A body under construction: each statement is run as it is added, so that shapes are known and what torch refuses is left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.program import Body, Node, Stmt
from fuzz.shapes import Both, Pair

LARGEST, FARTHEST = 160, 1e3  # elements of a value, and their size


class Builder:
    """Adds statements to a body. ``tensors`` are the values by id; ``gone`` ids whose variable has another value by now."""

    def __init__(self, body: Body, given: list[Tensor], rng: random.Random, double: bool, sized: bool) -> None:
        self.body, self.rng, self.double, self.sized = body, rng, double, sized
        self.later = rng  # for statements that came to the generator later
        self.writes = False  # whether any statement may write
        self.plain_dtypes = (torch.float64,) if double else (torch.float32,)
        self.made: set[str] = set()
        self.pristine = [(v.detach().clone(), v.requires_grad, v.is_leaf) for v in given]
        self.next = 0
        self.home = nn.Module()
        self.space: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": self.home, "Pair": Pair, "Both": Both}
        self.tensors: dict[int, Any] = {}
        self.gone: set[int] = set()
        for value in self._inputs():
            body.params.append(self.take(value))

    def _inputs(self) -> list[Tensor]:
        """What the body is given, as it was at first."""
        self.leaves = [value.clone().requires_grad_() for value, needs, _ in self.pristine if needs]
        graded = iter(self.leaves)
        given = [(next(graded) if needs else value.clone(), leaf) for value, needs, leaf in self.pristine]
        return [value if leaf or not value.requires_grad else value.clone() for value, leaf in given]

    def take(self, value: Any) -> int:
        """An id for a value."""
        at = self.next
        self.next += 1
        self.tensors[at] = value
        self.space[f"h{at}"] = value
        return at

    def fresh(self) -> int:
        at = self.next
        self.next += 1
        return at

    def attr(self, stem: str) -> str:
        """A name of a layer, parameter or buffer that the body has not got."""
        count = 1
        while f"{stem}{count}" in self.made:
            count += 1
        self.made.add(f"{stem}{count}")
        return f"{stem}{count}"

    def factories(self) -> set[int]:
        """What factories made: it is no value of the trace, and ``+=`` of it is called otherwise."""
        return {stmt.outs["t"] for stmt in self.body.stmts if stmt.kind == "factory"}

    def live(self, test: Callable[[Tensor], bool] = lambda t: True) -> list[int]:
        """Ids of floating-point values that can still be read, the latest more than once."""
        found = [
            at for at, t in self.tensors.items() if at not in self.gone and isinstance(t, Tensor) and t.is_floating_point() and test(t)
        ]
        return found + found[-3:] * 2

    def pick(self, test: Callable[[Tensor], bool] = lambda t: True) -> int | None:
        found = self.live(test)
        return self.rng.choice(found) if found else None

    def like(self, at: int) -> int | None:
        """Another value, or the same, of the same shape and dtype."""
        shape, dtype = self.tensors[at].shape, self.tensors[at].dtype
        return self.pick(lambda t: t.shape == shape and t.dtype == dtype)

    def stmt(self, text: str, ins: dict[str, int], *nodes: Node, outs: str = "o", **more: Any) -> Stmt:
        return Stmt(text, ins, tuple(nodes), {letter: self.fresh() for letter in outs}, **more)

    def _run(self, stmt: Stmt) -> None:
        for line in stmt.made:
            exec(line.format(S="self"), self.space)
        if stmt.made and self.double:
            self.home.double()
        names = self._names(stmt)
        exec(stmt.text.format(S="self", **names), self.space)

    def _names(self, stmt: Stmt) -> dict[str, str]:
        names = {letter: self.variable(at) for letter, at in stmt.ins.items()}
        for letter, at in stmt.outs.items():
            names[letter] = names[stmt.same[letter]] if letter in stmt.same else f"h{at}"
        self.variables.update({at: names[letter] for letter, at in stmt.outs.items()})
        return names

    @property
    def variables(self) -> dict[int, str]:
        known: dict[int, str] = self.__dict__.setdefault("_variables", {})
        return known

    def variable(self, at: int) -> str:
        return self.variables.get(at, f"h{at}")

    def add(self, stmt: Stmt | None, writes: bool = False) -> bool:
        """Run a statement and keep it; False, and all is as before, where torch refuses it or its values are out of bounds."""
        if stmt is None:
            return False
        try:
            self._run(stmt)
            names = self._names(stmt)
            values = {at: self.space[names[letter]] for letter, at in stmt.outs.items()}
            ok = all(self._fits(value) for value in [*values.values(), *(self.tensors[at] for at in stmt.ins.values())])
            self.tensors.update(values)
            if ok and writes:
                self._backward()
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            ok = False
        if not ok:
            self._again()
            for at in stmt.outs.values():
                self.tensors.pop(at, None)
            return False
        self.body.stmts.append(stmt)
        known = {**stmt.ins, **stmt.outs}
        self.gone.update(known[letter] for at, letter in stmt.same.items() if at in stmt.outs)
        self.gone.update(known[letter] for letter in stmt.hides)
        return True

    def _fits(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return True
        if value.numel() > LARGEST or value.numel() == 0:
            return False
        return not value.is_floating_point() or bool((value.detach().abs() < FARTHEST).all())

    def _backward(self) -> None:
        """Raise where autograd's backward would: something was overwritten that it needs."""
        live = [t for at, t in self.tensors.items() if at not in self.gone and isinstance(t, Tensor) and t.requires_grad]
        leaves = [*self.home.parameters(), *self.leaves]
        if live and leaves:
            torch.autograd.grad(sum(t.double().sum() for t in live), leaves, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]

    def _again(self) -> None:
        """All statements once more, from copies of what was given."""
        self.space["self"] = self.home = nn.Module()
        for at, value in zip(self.body.params, self._inputs(), strict=True):
            self.tensors[at] = self.space[f"h{at}"] = value
        for stmt in self.body.stmts:
            if stmt.calls is not None:
                self.space["self"].add_module(stmt.attr, self.blocks[stmt.attr])
            self._run(stmt)
            names = self._names(stmt)
            self.tensors.update({at: self.space[names[letter]] for letter, at in stmt.outs.items()})

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The scratch modules of the blocks that are called."""
        known: dict[str, nn.Module] = self.__dict__.setdefault("_blocks", {})
        return known
