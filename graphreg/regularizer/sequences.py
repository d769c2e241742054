"""Decides how selected values are read as sequences: a value is a sequence itself, or is one step of the sequence of a cell's calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from torch import fx, nn

from graphreg.errors import RegularizerError, shown
from graphreg.ir.convolution_axes import ALSO_KEEP_AXES, is_linear, nearest, operands_with_its_axes, shape_of, spatial_dims
from graphreg.ir.dataflow import sizes_of
from graphreg.ir.operations import PACKS, Operations, function_name, nodes_in, port_path, source_of
from graphreg.ir.provenance import chains
from graphreg.ir.roles import site_nodes
from graphreg.ir.selector import Pattern, Selector, exactly, strings
from graphreg.ir.site import Label, Site
from graphreg.ir.time_steps import Steps
from graphreg.ir.train_eval import ModeGraphs

_PERMUTE = {"permute", "transpose", "swapaxes", "swapdims"}
_FEW = 2  # of so few values, or fewer, it is not sure that they are the steps of a loop
# operations that may make one axis of two, or two of one, and keep the order of the elements
_REGROUP = {"view", "reshape", "flatten", "unflatten"}
# one output of a module: the module's path, and the names of the output (``Label.ports``)
Port = tuple[str, tuple[str, ...]]
# by site: the string that selected it, and how to read its value
Sequences = dict[Site, tuple[str, Steps]]


def require_selector(regularizer: Any) -> None:
    """Raise RegularizerError if the selector of a penalty on sequences has the string ``*``, or only strings that exclude sites."""
    kind, texts = type(regularizer).__name__, strings(regularizer.pattern)
    # Strings that only exclude sites select all others, as ``*`` does.
    if any(text.strip("! ") == "*" for text in texts) or (texts and all(Pattern.parse(text).exclude for text in texts)):
        key = regularizer.keys[0] if regularizer.keys else "key"
        raise RegularizerError(
            f"{kind} needs a selector: {regularizer.pattern!r} does not say which values are sequences. Give "
            f"{key}={{'{regularizer.strength_option}': {regularizer.weight:g}, 'pattern': 'rnn'}} or "
            f"{kind}('rnn', {regularizer.weight:g}), with a name of your model in place of 'rnn'; graphreg.names(model) lists them."
        )


def check_sequence_options(regularizer: Any) -> None:
    """Raise RegularizerError for a ``time_axis`` or ``lengths`` of the wrong type."""
    kind = type(regularizer).__name__
    axis, lengths = regularizer.engine_options.time_axis, regularizer.engine_options.lengths
    if type(axis) is not int:
        raise RegularizerError(
            f"{kind}: time_axis={shown(axis)} is not allowed; give the axis of time in the value, a whole number: 1 for "
            "[batch, time, ...], 0 for [time, batch, ...]."
        )
    if "counted" in regularizer.takes and lengths is None and axis != 1:
        raise RegularizerError(
            f"{kind}: time_axis={axis} without lengths= would do nothing. Give lengths=, the name of the input that says which steps count."
        )
    if lengths is not None and not isinstance(lengths, str):
        raise RegularizerError(
            f"{kind}: lengths={type(lengths).__name__} is not allowed; give the name of the input that carries the lengths."
        )


def check_call_arguments(kind: str, names: Sequence[str], options: Sequence[str], is_splice: bool) -> None:
    """Raise RegularizerError if arguments of ``__call__`` contradict each other or the class's options.

    ``steps`` excludes ``units``, and both exclude ``z`` and ``values``. In a splice, the argument
    ``lengths`` and the option ``lengths`` need each other. In a penalty, the argument ``lengths``
    needs the argument ``steps``; if the formula takes ``steps``, the option ``lengths`` needs the
    argument ``lengths``. The argument ``counted`` needs the option ``lengths``, and ``z`` or
    ``units``.

    Args:
        kind: The name of the class.
        names: The names of the arguments of ``__call__``.
        options: The names of the class's options.
        is_splice: Whether the class is a splice.
    """
    for form, what in (("steps", "a sequence"), ("units", "samples of units")):
        both = [name for name in ("z", "values", "steps") if name != form and name in names and form in names]
        if both:
            raise RegularizerError(f"{kind}.__call__ asks for {form} and for {both[0]}; it gets either {what} or a value. Leave one out.")
    if is_splice and ("lengths" in names) != ("lengths" in options):
        raise RegularizerError(
            f"{kind}: __call__ takes lengths if and only if the class has the option lengths, which names the input that carries them."
        )
    if "lengths" in names and "steps" not in names and not is_splice:
        raise RegularizerError(f"{kind}.__call__ asks for lengths, but not for the steps that have these lengths. Ask for steps, too.")
    if "counted" in names and ("lengths" not in options or not {"z", "units"}.intersection(names)):
        raise RegularizerError(
            f"{kind}.__call__ asks for counted, which says which steps of z or units count, as the option lengths says. Ask for z or "
            "units, too, and declare lengths: ModelInput = None."
        )
    if "steps" in names and "lengths" in options and "lengths" not in names:
        raise RegularizerError(f"{kind} has the option lengths, but its __call__ does not take lengths: the option would do nothing.")


def sequences(
    matched: Mapping[Site, str], regularizer: Any, values: Sequence[Site], operations: Operations, graphs: ModeGraphs
) -> Sequences:
    """Group the selected sites into sequences.

    If a selector string matches the path of a recurrent cell, the calls of the cell are steps: a
    call that reads the output of an earlier call continues its sequence. The same holds for a
    module that a cell calls in each step. For any other module, each call is a sequence of its own.
    A selector that is a function selects single calls.

    Args:
        matched: The selected sites, each with the string that selected it.
        regularizer: The regularizer, whose options say how to read a value.
        values: All value sites of the model.
        operations: The operations of the model's graphs.
        graphs: The graphs by mode.

    Returns:
        A dict. Each key is a selected site; the value is the string that selected the site, and how
        to read the site's value. For a sequence of calls, only the site of the first call is a key.

    Raises:
        RegularizerError: A value is no sequence, as far as shapes are known.
    """
    calls, read_as = _Calls(values, operations, graphs), Sequences()
    for text, named, steps in _runs(regularizer.pattern, matched, calls, values):
        cell = named if named and calls.is_cell(named[0]) else None
        read_as[steps[0]] = text, _steps(steps[0], steps, cell, calls, regularizer)
    for site, (_, form) in read_as.items():
        _require(site, form, regularizer)
        _require_time(site, form, regularizer, calls)
    return read_as


def cell_calls(
    selector: Selector, matched: Mapping[Site, str], values: Sequence[Site], operations: Operations, graphs: ModeGraphs
) -> dict[Site, tuple[str, tuple[Site, ...]]]:
    """Group the calls of recurrent cells among the selected sites, as ``sequences`` does.

    Here a cell must have parameters: a ReLU that a residual block calls twice is none.

    Returns:
        A dict. Each key is a selected site; the value is the string that selected it, and the sites
        of all calls if it is the first call of a cell, else ().
    """
    calls, grouped = _Calls(values, operations, graphs), dict[Site, tuple[str, tuple[Site, ...]]]()
    for text, named, steps in _runs(selector, matched, calls, values):
        if named and calls.cell(named[0], learned=True):
            grouped[steps[0]] = text, tuple(steps)
        else:
            grouped |= {step: (matched[step], ()) for step in steps if step in matched}
    return grouped


def _runs(
    selector: Selector, matched: Mapping[Site, str], calls: _Calls, values: Sequence[Site]
) -> Iterator[tuple[str, Port | None, list[Site]]]:
    """Yield each run of calls among the selected sites: the string, the module's output if a string names the module, the calls."""
    texts = strings(selector)
    # A call that a string such as ``!cell_1`` excludes is left out of its sequence.
    away = {id(site) for text in texts if (p := Pattern.parse(text)).exclude for site in p.find(values)}
    chosen_by = {text: {} if Pattern.parse(text).lone else _labels(text, values) for text in set(matched.values())} if texts else {}
    taken = set[Site]()
    for site, text in matched.items():
        # A call stands for its whole run, so no other call of the run begins a sequence.
        if site in taken:
            continue
        named = calls.named(site, chosen_by[text].get(site.name, ())) if texts else None
        for run in calls.runs(named) if named else [[site]]:
            steps = [call for call in run if id(call) not in away]
            taken.update(steps)
            # Nothing is left of a run if all of its calls are excluded.
            if steps:
                yield text, named, steps


class _Calls:
    """Finds the calls of each module, and which of them are the steps of one sequence.

    Attributes:
        operations: The operations of the graphs.
        graphs: The model's graphs.
        of: A dict. Each key is an output of a module; the value is the list of its sites, one for
            each call of the module.
        chains: A function that takes a module's path and returns a dict. Each key is a call of the
            module; the value is the first call of its chain, in which each call reads the output of
            an earlier one.
    """

    def __init__(self, values: Sequence[Site], operations: Operations, graphs: ModeGraphs) -> None:
        self.operations, self.graphs = operations, tuple(graphs.values())
        self.of: dict[Port, list[Site]] = {}
        for site in (value for value in values if value.selectable):
            for port in {_port(label) for label in site.labels if label.module is not None}:
                self.of.setdefault(port, []).append(site)
        self.chains = cache(lambda path: chains(self.graphs, operations, path))

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The node of each site, in the first graph that has it."""
        return {name: node for graph in reversed(self.graphs) for name, node in site_nodes(graph, self.operations).items()}

    def known_time_axis(self, site: Site) -> int | None:
        """Return the axis of time of a value that is no output of a recurrent layer; None if it is not known."""
        return self.attended(site) or (1 if site.is_map else self.time_axis(site))

    def attended(self, site: Site) -> int | None:
        """Return the axis of time of the output of an attention, or of a value with its axes; None if the value is none of them."""
        node, operations = self.nodes.get(site.name), self.operations
        made_by = node and nearest(node, self._attention_axis, lambda n: operands_with_its_axes(n, operations))
        return self._attention_axis(made_by) if made_by else None

    def _attention_axis(self, node: fx.Node) -> int | None:
        """Return the axis of time in the output of an attention, counted from the end; None if the node computes none."""
        name, operations = function_name(node), self.operations
        if name == "scaled_dot_product_attention":
            return -2
        equation = node.args[0] if name == "einsum" and isinstance(node.args[0], str) else "qk,k->q."
        weights = next(nodes_in(node.args), None)
        if name not in ("matmul", "__matmul__", "bmm", "einsum") or weights is None or "->" not in equation:
            return None
        is_softmax = nearest(
            weights, lambda n: function_name(n) == "softmax" or isinstance(operations.module(n), nn.Softmax),
            lambda n: operands_with_its_axes(n, operations),
        )  # fmt: skip
        given, made = equation.replace(" ", "").split(",")[0], equation.replace(" ", "").split("->")[1]
        return made.index(given[-2]) - len(made) if is_softmax and given[-2:-1] and given[-2] in made else None

    def time_axis(self, site: Site) -> int | None:
        """Return the axis of time of a value that is no output of a recurrent layer.

        It is 1, unless a path leads between the value and a layer of [time, batch, ...], or a stack of
        steps. Then the axis is followed through operations that keep or permute the axes; None if
        there are others on each path, or if the value is a stack of sequences. From a layer of [batch, time, ...], it is followed, too.
        """
        node = self.nodes.get(site.name)
        if node is None or node in self.times:
            return 1 if node is None else self.times[node]
        if node in self.moved:
            return self.moved[node]
        return None if nearest(node, self._stacks_sequences, lambda n: operands_with_its_axes(n, self.operations)) else 1

    @cached_property
    def times(self) -> dict[fx.Node, int | None]:
        """The axis of time of each value from which a path leads to a layer of [time, batch, ...] or a stack of steps, if it is known."""
        times: dict[fx.Node, int | None] = {**self._followed((*self._layers(batch_first=False), *self._stacks()), 0)}
        sizes = set[fx.Node]().union(*map(sizes_of, self.graphs)) if times else set()
        waiting = list(times)
        while waiting:
            node = waiting.pop()
            for other in (*node.users, *node.all_input_nodes):
                if other not in times and other not in sizes and other.op not in ("get_attr", "output"):
                    times[other] = None
                    waiting.append(other)
        return times

    @cached_property
    def moved(self) -> dict[fx.Node, int]:
        """The axis of time of what is computed, by operations that keep or permute the axes, from a layer of [batch, time, ...]."""
        return self._followed(self._layers(batch_first=True), 1)

    def _followed(self, values: Iterable[fx.Node], axis: int) -> dict[fx.Node, int]:
        """Return the axis of time of these values, which is ``axis``, and of those that are computed from them or they from these."""
        times = dict.fromkeys(values, axis)
        waiting = list(times)
        while waiting:
            node = waiting.pop()
            for other, moved in self._with_time(node, times[node]):
                if other not in times:
                    times[other] = moved
                    waiting.append(other)
        return times

    def _with_time(self, node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
        """Yield the values that are computed from a value, or from which it is computed, and keep the axis of time, with this axis."""
        for user in node.users:
            if node in self._alike(user, node, axis):
                yield user, axis + _more_dims(user, node)
            elif (dims := _permuted(user)) and node in list(nodes_in(user.args))[:1] and axis in dims:
                yield user, dims.index(axis)
        for operand in self._alike(node, node, axis):
            if axis >= _more_dims(node, operand):  # else the operand is repeated along the axis
                yield operand, axis - _more_dims(node, operand)
        if (dims := _permuted(node)) and axis < len(dims):
            yield next(nodes_in(node.args)), dims[axis]

    def convolution_behind(self, site: Site) -> fx.Node | None:
        """Return the convolution that made the value, perhaps through operations that keep or regroup its axes; None if there is none."""

        def operands(node: fx.Node) -> list[fx.Node]:
            return _regrouped(node) or list(operands_with_its_axes(node, self.operations))

        return nearest(self.nodes[site.name], lambda node: spatial_dims(node, self.operations), operands)

    def _layers(self, batch_first: bool) -> Iterator[fx.Node]:
        """Yield what a layer with this ``batch_first`` reads and returns."""
        layers = {path for path, module in self.operations.modules.items() if getattr(module, "batch_first", None) is batch_first}
        # the layers of a Transformer know the order, and the Transformer may not
        paths = {path[:end] for path in layers for end in [*[i for i, letter in enumerate(path) if letter == "."], len(path)]}

        def has_order(call: fx.Node, place: int) -> bool:
            return (True in (*call.args[place : place + 1], call.kwargs.get("batch_first"))) is batch_first

        for node in (node for graph in self.graphs for node in graph.nodes):
            source = source_of(node, self.operations)
            is_call = source.op == "call_module" and str(source.target) in paths and not self._reads_packed(source)
            is_pad = function_name(source) == "pad_packed_sequence" and has_order(source, 1)
            is_pack = function_name(node) == "pack_padded_sequence" and has_order(node, 2)
            if (is_call or is_pad) and port_path(node) in ((), (0,)):
                yield node
            if is_pack or (is_call and node is source):
                yield from list(nodes_in((node.args, node.kwargs)))[:1]

    def _stacks(self) -> Iterator[fx.Node]:
        """Yield stacks of steps, and values into which a loop writes step by step."""
        written = Counter[fx.Node]()
        for node in (node for graph in self.graphs for node in graph.nodes):
            if function_name(node) in ("stack", "cat") and self._stacks_steps(node):
                yield node
            if function_name(node) in ("setitem", "__setitem__") and isinstance(node.args[1], int):
                written.update(nodes_in(node.args[:1]))
        yield from (node for node, count in written.items() if count > _FEW)

    def _reads_packed(self, node: fx.Node) -> bool:
        """Return whether a layer gets a PackedSequence, in which the order of the axes of its padded form is lost."""
        first = next(nodes_in(node.args), None)
        return first is not None and function_name(first) in PACKS

    def _stacks_steps(self, node: fx.Node) -> bool:
        """Return whether axis 0 of a stack is of what one module or function has returned again and again, as in a loop over steps."""
        items = list(nodes_in((node.args[:1], node.kwargs.get("tensors"))))
        if function_name(node) == "cat":  # of [1, batch, ...]
            if not all(function_name(item) == "unsqueeze" and item.args[1:] == (0,) for item in items):
                return False
            items = [next(nodes_in(item.args)) for item in items]
        made_by = [source_of(item, self.operations).target for item in items]
        return bool(_stack_axis(node) == 0) and len(items) > _FEW and len(set(made_by[1:])) == 1  # the first may be an initial state

    def _stacks_sequences(self, node: fx.Node) -> bool:
        """Return whether the value is a stack of values of three or more axes, along an axis before that of time."""
        items = list(nodes_in((node.args[:1], node.kwargs.get("tensors"))))
        if function_name(node) != "stack" or _stack_axis(node) not in (0, 1):
            return False
        layers = (self.operations.module(source_of(item, self.operations)) for item in items)
        return any(len(shape_of(item) or ()) > 2 for item in items) or any(isinstance(layer, nn.RNNBase) for layer in layers)

    def _alike(self, node: fx.Node, along: fx.Node, axis: int) -> list[fx.Node]:
        """Return the operands that have the axes of a node's value. A linear layer keeps the ``axis`` of ``along``, unless it is last."""
        if is_linear(node, self.operations):
            shape = shape_of(along)
            return list(nodes_in(node.args))[: shape is None or axis != len(shape) - 1]
        alike = list(nodes_in(node.args))[:1] if function_name(node) in ALSO_KEEP_AXES else operands_with_its_axes(node, self.operations)
        return [operand for operand in alike if operand.op != "get_attr"]

    def named(self, site: Site, labels: Sequence[Label]) -> Port | None:
        """Return the module output among ``labels`` whose calls may be the steps of a sequence; None if there is no such output.

        The module is one of torch's cells, or is called several times. Of several such outputs, the
        one with the most calls is returned.
        """
        if site.sequence:  # a recurrent layer: each call is a sequence
            return None
        several = [port for port in map(_port, labels) if len(self.of[port]) > 1 or self._of_torch(port[0])]
        return max(several, key=lambda port: len(self.of[port]), default=None)

    def _of_torch(self, path: str) -> bool:
        return isinstance(self.operations.modules[path], nn.RNNCellBase)

    def cell(self, path: str, learned: bool = False) -> str | None:
        """Return the path of the cell of which the module's calls are the steps; None if they are not the steps of a cell.

        A cell is one of torch's cells, or a module whose calls read its earlier outputs. The cell
        may be the module itself, or a module that contains it and is called as often. ``learned``:
        whether the cell must have parameters.
        """
        count = len(self.chains(path))
        # 0: a ModuleList or the like, which is never called
        while path and len(chain := self.chains(path)) in (0, count):
            is_cell = chain and (self._of_torch(path) or len(set(chain.values())) < count)
            if is_cell and not (learned and next(self.operations.modules[path].parameters(), None) is None):
                return path
            path = path.rpartition(".")[0]
        return None

    def is_cell(self, path: str) -> bool:
        """Return whether the module's calls are the steps of a cell."""
        return self.cell(path) is not None

    def runs(self, port: Port) -> list[list[Site]]:
        """Return the sites at which a module's calls return the output ``port``, grouped into runs. Each run is a sequence.

        In a run of a cell, each call but the first reads an output of an earlier call. If the
        module's calls are not the steps of a cell, each call is a run of its own.
        """
        calls, cell = self.of[port], self.cell(port[0])
        if cell is None:
            return [[call] for call in calls]
        call_names, firsts = list(self.chains(port[0])), list(self.chains(cell).values())
        # a torch cell that is called without a state: no call reads another's output; all are one
        # run
        if len(set(firsts)) == len(firsts):
            return [calls]
        first_of = dict(zip(call_names, firsts, strict=True))
        by_first: dict[str, list[Site]] = {}
        for call in calls:
            name = next(label.name for label in call.labels if label.module == port[0])
            by_first.setdefault(first_of[name], []).append(call)
        return list(by_first.values())


def _permuted(node: fx.Node) -> list[int] | None:
    """Return, for each axis of the result of a transposition or permutation, the axis of the operand; None for any other operation."""
    name, (first, *given) = function_name(node), node.args or (None,)
    if name not in _PERMUTE or not isinstance(first, fx.Node) or node.kwargs:
        return None
    shape = shape_of(node)
    flat: list[Any] = [each for arg in given for each in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    if not flat or not all(isinstance(each, int) for each in flat) or (shape is None and min(flat) < 0):
        return None
    rank = len(shape) if shape is not None else max(len(flat), max(flat) + 1)
    axes: list[int] = [each % rank for each in flat]
    if name == "permute":
        return axes if len(axes) == rank else None
    dims = list(range(rank))
    dims[axes[0]], dims[axes[1]] = dims[axes[1]], dims[axes[0]]
    return dims


def _more_dims(node: fx.Node, operand: fx.Node) -> int:
    """Return how many dims more a node's value has than an operand of it; 0 if the shapes are not known."""
    ours, theirs = shape_of(node), shape_of(operand)
    return 0 if ours is None or theirs is None else len(ours) - len(theirs)


def _regrouped(node: fx.Node) -> list[fx.Node]:
    """Return the operand of an operation that regroups its axes; an empty list for any other operation."""
    return list(nodes_in(node.args))[:1] if function_name(node) in _REGROUP else []


def splice_steps(
    sites: Iterable[Site], regularizer: Any, values: Sequence[Site], operations: Operations, graphs: ModeGraphs
) -> dict[Site, Steps | None]:  # fmt: skip
    """Return, for each site, how a splice reads its value as a sequence; None if the splice does not use the axis of time.

    Raises:
        RegularizerError: The splice needs the axis of time, and a value is no sequence, as far as its shape is known. Or the splice
            would take the axis of time for that of the examples.
    """
    options, calls = regularizer.engine_options, _Calls(values, operations, graphs)
    uses_time = (options.lengths is not None and "lengths" in regularizer.takes) or {"time", "batch"}.intersection(options.share_axes)
    found = dict[Site, Steps | None]()
    for site in sites:
        if getattr(regularizer, "batch_axis", None) in (0, 1):
            _require_batch(site, regularizer, calls)
        found[site] = _steps(site, [], None, calls, regularizer) if uses_time else None
        if "time" in options.share_axes and (steps := found[site]):
            _require(site, steps, regularizer)
            _require_time(site, steps, regularizer, calls)
    return found


def _port(label: Label) -> Port:
    return label.module or "", label.ports


def _labels(text: str, values: Sequence[Site]) -> dict[str, list[Label]]:
    """Return, for each site that a selector string matches, those of its labels that are outputs of modules.

    A label counts if the string matches both the label and the path of its module.
    """
    labels: dict[str, list[Label]] = {}
    pattern = Pattern.parse(text)
    for label, site in pattern.labels(values):
        of_site = labels.setdefault(site.name, [])
        if label.module is not None and pattern.path(label.module):
            of_site.append(label)
    return labels


def _steps(site: Site, steps: Sequence[Site], named: Port | None, calls: _Calls, regularizer: Any) -> Steps:
    axis, lengths = regularizer.engine_options.time_axis, regularizer.engine_options.lengths
    # 1 is the default, and 0 is where the stack of the calls has time.
    if named and axis not in (0, 1):
        raise RegularizerError(
            f"{type(regularizer).__name__} at {site.name}: time_axis={axis} has no meaning where the calls of {named[0]} "
            "are the steps. Leave time_axis out. If each call is a sequence, select the calls by a function of a site."
        )
    if named:
        return Steps(0, tuple(steps), isinstance(calls.operations.modules[named[0]], nn.RNNCellBase), lengths)
    if site.sequence:
        return Steps(_layer_axis(site, regularizer), (), True, lengths)
    # [batch, heads, time, size]. Axis 1 may be the default; whoever means it writes it as a negative number.
    if axis == 1:
        known, dims = calls.known_time_axis(site), len(site.shape or (0, 0, 0))
        if known is None and (dims > 2 or "batch" in regularizer.engine_options.share_axes):
            option, other = ("time_axis", 1 - dims) if hasattr(regularizer, "time_axis") else ("share_axes", 1)
            raise RegularizerError(
                f"{type(regularizer).__name__} at {site.name}: a layer of [time, batch, ...] or a stack is near this value, and "
                "operations between them may change the axes, so it is not known which axis is time. Give its number: "
                f"{option}=0 if axis 0 is, {option}={other} if axis 1 is."
            )
        axis = 1 if known is None else known
    return Steps(axis, lengths=lengths, hint=_hint(site, calls, splice="time" in regularizer.engine_options.share_axes))


def _hint(site: Site, calls: _Calls, splice: bool) -> str:
    """Return a sentence that says what to select instead of one call of a module; ``""`` if the site is not one of several calls."""
    several = [label for label in site.labels if label.module is not None and len(calls.of[_port(label)]) > 1]
    if not several:
        return ""
    path = several[0].module or ""
    selector = exactly(replace(several[0], name=path))
    if calls.is_cell(path) and splice:
        return (
            f" This is one call of {path!r}. A splice acts on each call by itself, and the calls of a cell cannot share a draw. Use a "
            "recurrent layer, such as nn.GRU, or select a stack of the values (torch.stack)."
        )
    if calls.is_cell(path):
        return f" This is one call of {path!r}: the selector '{selector}' takes all its calls as the steps of one sequence."
    return (
        f" This is one call of {path!r}, which reads none of its earlier outputs: each call is a sequence of its own. If the calls are "
        "the steps of one sequence, let the model stack their values (torch.stack), and select the stack."
    )


def _layer_axis(site: Site, regularizer: Any) -> int:
    """Return the axis of time in the output of a recurrent layer. Raises RegularizerError if ``time_axis`` gives another axis."""
    given, axis = regularizer.engine_options.time_axis, 1 if site.sequence == "batch first" else 0
    # 1 is the default, so it may not have been given
    # axis - 3 is the same axis of [time, batch, units], counted from the end.
    if site.sequence != "state" and given not in (1, axis, axis - 3):
        raise RegularizerError(
            f"{type(regularizer).__name__} at {site.name}: time_axis={given} is not the axis of time in the output of this layer, which is "
            f"{axis} (batch_first={axis == 1}). Leave time_axis out: graphreg reads it from the layer."
        )
    return axis


def _stack_axis(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))


def _require(site: Site, steps: Steps, regularizer: Any) -> None:
    who = f"{type(regularizer).__name__} at {site.name}"
    if site.sequence == "state":
        layer = replace(site.labels[0], default=True)
        raise RegularizerError(
            f"{who}: this is the state of {layer.name} after the last step, no sequence. Select '{exactly(layer)}:out'; "
            f"if a glob matches both, add '!{exactly(site.labels[0])}'."
        )
    # Without example inputs, no shape is known here.
    shapes = [call.shape for call in steps.calls or (site,) if call.shape is not None]
    if shapes:
        steps.require_calls(shapes, who)
        steps.require((len(steps.calls), *shapes[0]) if steps.calls else shapes[0], who)


def _require_batch(site: Site, regularizer: Any, calls: _Calls) -> None:
    """Raise RegularizerError if ``batch_axis`` is 0, the default, or 1, and that may be the axis of time, or is that of channels."""
    axis = ("time first", "batch first").index(site.sequence) if "first" in site.sequence else calls.known_time_axis(site)
    who, dims = f"{type(regularizer).__name__} at {site.name}", len(site.shape or (0, 0, 0))
    if regularizer.batch_axis == 1:
        if site.is_map or (axis == 1 and (site.sequence or calls.nodes.get(site.name) in calls.times)):
            raise RegularizerError(
                f"{who}: axis 1 of this value is {'channels' if site.is_map else 'time'}, and batch_axis=1 would take it for examples. "
                "Give options by site, such as {'attend': {'strength': 0.1, 'batch_axis': 1}, 'mlp': 0.1}."
            )
    elif axis == 0:
        raise RegularizerError(
            f"{who}: axis 0 of this value is time, because a layer of [time, batch, ...] reads it or has made it, and batch_axis=0 would "
            f"take its steps for examples. Give batch_axis=1; if axis 0 has the examples nevertheless, give batch_axis={-dims}."
        )
    elif axis is None and dims > 2:  # [batch, units] has no steps
        raise RegularizerError(
            f"{who}: a layer of [time, batch, ...] or a stack is near this value, and operations between them may change the axes, so it "
            f"is not known which axis has the examples. Give its number: batch_axis={-dims} if axis 0 has them, batch_axis={1 - dims} if "
            "axis 1 has."
        )


def _require_time(site: Site, steps: Steps, regularizer: Any, calls: _Calls) -> None:
    """Raise RegularizerError if time would be axis 1 of a value that comes from a convolution, where axis 1 is channels."""
    if steps.calls or site.sequence or steps.axis != 1 or not (site.is_map or calls.convolution_behind(site)):
        return
    operations, dims, node = calls.operations, site.spatial or 1, calls.nodes[site.name]
    made_by = nearest(node, lambda each: spatial_dims(each, operations), lambda each: each.all_input_nodes)
    by = made_by or nearest(node, lambda each: spatial_dims(each, operations), lambda each: each.users)
    name = "" if by is None else str(by.target) if operations.module(by) is not None else function_name(by)
    comes = f"the value {'comes from' if made_by else 'goes to'} a convolution ({name}), so its axis 1 is channels"
    if by is None:
        comes = "the value comes from a batch norm or group norm, whose axis 1 is channels"
    axes = " or ".join(str(axis) for axis in range(2, 2 + dims))
    if not hasattr(regularizer, "time_axis"):
        raise RegularizerError(
            f"{type(regularizer).__name__} at {site.name}: {comes}, and "
            f"share_axes='time' would take them for steps. Give the number of the axis of time: share_axes={axes}."
        )
    raise RegularizerError(
        f"{type(regularizer).__name__} at {site.name}: {comes}, and "
        f"time_axis=1 would take them for steps. Give time_axis={axes}; if axis 1 is time nevertheless, give time_axis={-1 - dims}."
    )


def check_lengths(chosen: Sequences, known: Any, who: str) -> None:
    """Raise RegularizerError if the input that carries the lengths has a shape or dtype that does not fit the sequences.

    Args:
        chosen: The sequences, as ``sequences`` returns them.
        known: The input's shape and dtype; anything else if these are not known.
        who: The regularizer, for messages.
    """
    for site, (_, steps) in chosen.items():
        if isinstance(known, tuple) and site.shape is not None:
            shape, dtype = known
            steps.require_lengths(shape, dtype, (len(steps.calls), *site.shape) if steps.calls else site.shape, f"{who} at {site.name}")
