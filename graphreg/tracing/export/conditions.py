"""The conditions on input sizes under which an exported graph holds: torch.export's guards, and some for which it makes none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graphreg.errors import GraphRegError
from graphreg.ir.operations import function_name
from graphreg.torch_internals.export import evaluated, example_sizes, excludes_one
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.torch_modes import without_proxies
from graphreg.tracing.export.op_record import OpRecord

DECIDES_ON_BATCH = "a condition on sizes in the forward does not hold for a batch of one."


def note_decisions(patches: Changes, asks: Callable[[], bool], decisions: list[tuple[Any, bool]], negated: Collection[str]) -> None:
    """Note each condition on sizes whose answer the model's code asks for, and the answer, until the block of ``patches`` ends.

    Args:
        patches: Ends the interception when its block ends.
        asks: Returns whether the model's own code runs, and not an operation.
        decisions: The list to which the conditions, as sympy expressions, and answers are added.
        negated: Texts of conditions that are not noted, and for which the code gets the opposite answer.
    """
    answer: Callable[[torch.SymBool], bool] = torch.SymBool.__bool__

    def decided(condition: torch.SymBool) -> bool:
        asked = condition.node.expr  # read first, because computing the answer may replace symbols of the expression
        value = answer(condition)
        if not asks():
            return value
        if str(asked) in negated:
            return not value
        decisions.append((asked, value))
        return value

    patches.put(torch.SymBool, "__bool__", decided)


def squeezed(value: Tensor, dim: Any = None, **more: Any) -> Iterator[Any]:
    """For each axis of varying size in the ``dim`` of ``squeeze``, yield what holds for the example: that the size is 1, or is not."""
    with without_proxies():
        for axis in dim if isinstance(dim, (tuple, list)) else () if dim is None else (dim,):
            is_one = value.shape[axis] == 1
            if isinstance(is_one, torch.SymBool):
                asked = is_one.node.expr
                yield asked if is_one else ~asked


class Conditions:
    """Collects the conditions that the graph must assert.

    Attributes:
        asserted: The conditions, as sympy expressions in the symbols of input sizes.
        assumes_no_zero: Whether the graph must also assert that no variable size is 0: with a size of 0, the forward could get another
            answer, or a condition would divide by 0.
        fail_for_one: A dict of the conditions that hold for the example inputs, but not for a batch of one. Each key is the text of what
            the forward asked. These conditions are not among ``asserted``.
    """

    def __init__(self, environment: Any, record: OpRecord, batches: Iterable[Any], wide: bool) -> None:
        """Collect the conditions.

        Args:
            environment: torch.export's environment of symbols.
            record: What was recorded while torch.export ran.
            batches: The size of the first axis of each input.
            wide: Whether the example was a batch of one that was widened to two.

        Raises:
            GraphRegError: The example was a batch of one, and a guard of torch.export or a condition of a ``squeeze`` is false for it.
        """
        self._examples = example_sizes(environment)
        # Some guards of an operation only exclude that it broadcasts. They are left out, because the operation decides anew at each call
        # whether it does. Its other guards stay, because they decide the sizes of its result, which the forward may read.
        guards = [
            guard.expr for i, guard in enumerate(environment.guards) if i not in record.op_guards or not excludes_one(guard.expr)
        ]
        # A size may turn out to be a constant or a multiple of another size. Then no input has its symbol any longer, so a guard that was
        # made before must get the new expression in place of the symbol.
        self.asserted = [environment.replace(guard) for guard in (*guards, *record.squeezed)]
        self.assumes_no_zero = any(not asked.free_symbols for asked, _ in record.decisions)
        self.assumes_no_zero |= any(None in self._for_small_sizes(each) for each in self.asserted)
        batches = list(batches)
        self._ones = {size.node.expr: 1 for size in batches if isinstance(size, torch.SymInt)}
        # to two, because torch.export found that the forward allows no other size
        fixed = any(not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols for size in batches)
        if wide and (fixed or not all(self._holds(condition, self._ones) for condition in self.asserted)):
            raise GraphRegError(DECIDES_ON_BATCH)
        self.fail_for_one = dict[str, Any]()
        for asked, answer in record.decisions:
            condition = environment.replace(asked if answer else ~asked) if asked.free_symbols else asked
            if False in self._for_small_sizes(condition):
                if self._holds(condition, self._ones):
                    self.asserted.append(condition)
                else:
                    self.fail_for_one[str(asked)] = condition

    def idle_expands(self, graph: fx.Graph) -> set[fx.Node]:
        """Return each ``expand`` of the graph that would change nothing for a batch of one."""
        return {
            node for node in graph.nodes
            if function_name(node) == "expand" and node.args and isinstance(node.args[0], fx.Node)
            and self._shape_for_one(node) == self._shape_for_one(node.args[0]) is not None
        }  # fmt: skip

    def _shape_for_one(self, node: fx.Node) -> list[Any] | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        return [size.node.expr.xreplace(self._ones) if isinstance(size, torch.SymInt) else size for size in value.shape]

    def _for_small_sizes(self, condition: Any) -> Iterator[bool | None]:
        """For each size in a condition, evaluate the condition with that size at 0 and at 1, and all others as in the example inputs.

        None stands for a division by 0. Conditions on sizes that depend on data are not evaluated: torch.export itself asserts them.
        """
        symbols = condition.free_symbols
        for symbol in symbols if symbols <= self._examples.keys() else ():
            for size in (0, 1):
                try:
                    yield self._holds(condition, {symbol: size})
                except ZeroDivisionError:
                    yield None

    def _holds(self, condition: Any, sizes: dict[Any, int]) -> bool:
        return bool(evaluated(condition, {symbol: int(sizes.get(symbol, self._examples[symbol])) for symbol in condition.free_symbols}))
