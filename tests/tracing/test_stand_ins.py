"""What a forward asks of a value, and what a stand-in answers: what the value would, or the trace is refused.

Each model is traced by torch.fx with example inputs, and without. With them its output is that of the model; without them, too, or there is
an error that asks for them. Inputs that would get another answer raise.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
import operator
import pickle
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphreg
from graphreg import GraphRegError, TraceError
from graphreg.errors import OtherInputs

LOG = logging.getLogger(__name__)
X, LONG, DEEP = torch.arange(12.0).view(3, 4), torch.ones(5, 4), torch.ones(2, 3, 4)
Forward = Callable[..., Any]


class Pair(NamedTuple):
    q: Any
    k: Any


class Mode(Enum):
    A, B = 1, 2


class Model(nn.Module):
    """A model with a forward of a test, and with layers that such a forward may call."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function: Forward = function
        self.layer, self.recurrent = nn.Linear(4, 4), nn.LSTM(4, 4)


class OfOne(Model):
    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def made(function: Forward, kind: type[nn.Module] = OfOne) -> nn.Module:
    torch.manual_seed(0)
    return kind(function).eval()


def traced(model: nn.Module, example: Any) -> nn.Module:
    return graphreg.strip(graphreg.regularize(model, missing="ignore", example_inputs=example, front_end="symbolic", prove=False)).eval()


def check(function: Forward, x: Any, others: tuple[Any, ...] = ()) -> None:
    """The trace with the example, and that without, give what the model gives, or raise; with the example, they do not raise for it."""
    model = made(function)
    want, module = model(x), traced(model, (x,))
    torch.testing.assert_close(module(x), want, rtol=0, atol=0)
    try:
        unseen = traced(model, None)
    except TraceError as error:
        assert "example_inputs" in str(error)
    else:
        try:
            found = unseen(x)
        except GraphRegError:
            found = want
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    for other in others:
        # for arguments of another structure, the model is traced on the side, where it may raise its own error
        with pytest.raises((GraphRegError, ValueError), match="these inputs|have the structure|too many values to unpack"):
            module(other)


def tries(x: Any) -> float:
    try:
        return float(x.mask)
    except AttributeError:
        return 2.0


def tries_of_shape(x: Any) -> float:
    try:
        return float(x.shape.mask)
    except AttributeError:
        return 2.0


def tries_in_function(x: Any) -> float:
    try:
        return float(operator.attrgetter("mask")(x))
    except AttributeError:
        return 2.0


ATTRIBUTES: dict[str, Forward] = {
    "hasattr": lambda m, x: m.layer(x) * (3.0 if hasattr(x, "mask") else 2.0),
    "hasattr of a result": lambda m, x: m.layer(x) * (3.0 if hasattr(m.layer(x), "mask") else 2.0),
    "hasattr of a size": lambda m, x: m.layer(x) * (3.0 if hasattr(x.shape[0], "item") else 2.0),
    "hasattr of a tensor's": lambda m, x: m.layer(x) * (3.0 if hasattr(x, "softmax") and not hasattr(x, "keys") else 2.0),
    "hasattr of a layer's tuple": lambda m, x: x * (3.0 if hasattr(m.recurrent(x), "shape") else 2.0),
    "getattr": lambda m, x: m.layer(x) + getattr(x, "bias", 1.0),
    "try": lambda m, x: m.layer(x) * tries(x),
    "try of a shape": lambda m, x: m.layer(x) * tries_of_shape(x),
    "try of a function": lambda m, x: m.layer(x) * tries_in_function(x),
    "callable": lambda m, x: m.layer(x) * (3.0 if callable(x) else 2.0) * (5.0 if callable(x.relu) else 7.0),
    "dir": lambda m, x: m.layer(x) * (3.0 if "softmax" in dir(x) and "tracer" not in dir(x) else 2.0),
    "vars": lambda m, x: m.layer(x) * (3.0 if vars(x) else 2.0),
    "__dict__": lambda m, x: m.layer(x) * (3.0 if "node" in x.__dict__ else 2.0),
    "__class__": lambda m, x: m.layer(x) * (3.0 if x.__class__ is Tensor else 2.0),
    "the name of its class": lambda m, x: m.layer(x) * len(type(x).__name__) * len(m.layer(x).__class__.__name__),
    "type": lambda m, x: m.layer(x) * (3.0 if type(x) is Tensor and type(x.shape) is torch.Size else 2.0),
    "type of a size": lambda m, x: m.layer(x) * (3.0 if type(x.shape[0]) is int else 2.0),
    "type, otherwise": lambda m, x: m.layer(x) * (3.0 if type(m).__name__ == "OfOne" and isinstance(type(m), type) else 2.0),
    "issubclass": lambda m, x: m.layer(x) * (3.0 if issubclass(type(x), Tensor) else 2.0),
    "torch.jit.isinstance": lambda m, x: m.layer(x) * (3.0 if torch.jit.isinstance(m.layer(x), Tensor) else 2.0),
    "special methods": lambda m, x: m.layer(x) * (3.0 if hasattr(x, "__round__") or hasattr(x.shape[0], "__iter__") else 2.0),
    "a device's index": lambda m, x: m.layer(x) * (3.0 if x.device.index is None else 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_stand_in_has_the_attributes_and_the_class_of_its_value(name: str) -> None:
    check(ATTRIBUTES[name], X)


def is_single(dtype: torch.dtype) -> bool:
    return dtype is torch.float32


TEXTS: dict[str, tuple[Forward, tuple[Any, ...]]] = {
    "str": (lambda m, x: x * (3.0 if "float32" in str(x.dtype) else 2.0), (X.double(),)),
    "a device": (lambda m, x: x * (3.0 if f"{x.device}" == "cpu" else 2.0), ()),
    "an old format": (lambda m, x: x * (3.0 if "%s" % x.device == "cpu" else 2.0), ()),  # noqa: UP031
    "repr": (lambda m, x: x * len(repr(x.shape)), (torch.ones(10, 4),)),
    "a size": (lambda m, x: x * (3.0 if f"{x.shape[0]:03d}" == "003" else 2.0), (LONG,)),
    "sizes": (lambda m, x: x * len(str(tuple(x.shape))), (torch.ones(10, 4),)),
    "is": (lambda m, x: x * (3.0 if x.dtype is torch.float32 else 2.0), (X.double(),)),
    "is not": (lambda m, x: x * (3.0 if x.dtype is not torch.float64 else 2.0), (X.double(),)),
    "is, in a function": (lambda m, x: x * (3.0 if is_single(x.dtype) else 2.0), (X.double(),)),
    "a layout": (lambda m, x: x * (3.0 if x.layout is torch.strided else 2.0), ()),
    "a flag": (lambda m, x: x * (3.0 if x.is_cuda is False else 2.0), ()),
    "a product": (lambda m, x: x * int(numpy.prod(x.shape)), (LONG,)),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_what_only_a_tensor_knows_is_asserted(name: str) -> None:
    function, others = TEXTS[name]
    check(function, X, others)


@pytest.mark.parametrize("example", [None, (X,)])
def test_numpys_functions_of_a_size_are_followed(example: Any) -> None:
    module = traced(made(lambda m, x: x / numpy.sqrt(x.shape[0]) + numpy.log(x.shape[-1]) * numpy.exp(-x.size(0) / 2)), example)
    for x in (X, LONG):
        torch.testing.assert_close(module(x), x / math.sqrt(len(x)) + math.log(x.shape[-1]) * math.exp(-len(x) / 2))


def test_what_was_not_asked_is_not_asserted() -> None:
    module = traced(made(lambda m, x: (x * 2).to(x.dtype).to(x.device) + x.new_zeros(x.shape)), (X,))
    assert torch.equal(module(X.double()), X.double() * 2) and torch.equal(module(LONG), LONG * 2)
    assert "decided" not in module.code


@pytest.mark.parametrize("ask", [repr, str, "{:>3}".format])
def test_the_text_of_a_tensor_is_refused(ask: Callable[[Any], str]) -> None:
    with pytest.raises(TraceError, match="the text of 'x', which depends on a tensor's values"):
        traced(made(lambda m, x: m.layer(x) * len(ask(x))), (X,))


def told(m: Any, x: Any) -> Any:
    torch._assert(x.shape[0] > 0, f"a batch of {x.shape[0]}, of {x.dtype}")
    print(x.shape, f"{x}", end="")
    LOG.debug(f"{x.shape}")
    LOG.debug("%s", x.shape)
    return m.layer(x)


@pytest.mark.parametrize("inputs", [(X,), None])
def test_a_text_that_only_tells_something_decides_nothing(inputs: Any) -> None:
    """The message of an assertion, a print, a line of a log: any size works, also without inputs, as in all models of timm."""
    model = made(told).eval()
    module = traced(model, inputs)
    assert "decided" not in module.code
    for x in (X, X[:1]):
        assert torch.equal(module(x), model(x))


def of_sequence(m: Any, x: Any) -> Any:
    match x:
        case [a, b]:
            return a * b
        case [a, *_]:
            return a * 3
        case _:
            return m.layer(x)


def of_mapping(m: Any, x: Any) -> Any:
    match x:
        case {"q": q}:
            return q * 2
        case {"k": k, **rest}:
            return k * 3 + len(rest)
        case _:
            return m.layer(x)


def of_shape(m: Any, x: Any) -> Any:
    match x.shape:
        case (_, _):
            return m.layer(x)
        case (_, _, _):
            return x * 3
        case _:
            return x


def of_kind(m: Any, x: Any) -> Any:
    match x.dtype, x:
        case torch.float32, Tensor():
            return m.layer(x)
        case _:
            return x


PATTERNS: dict[str, tuple[Forward, Any, tuple[Any, ...]]] = {
    "a tensor is no sequence": (of_sequence, X, ()),
    "a tuple": (of_sequence, (X, X), ((X, X, X),)),
    "a list": (of_sequence, [X, X, X], ((X, X),)),
    "a tensor is no mapping": (of_mapping, X, ()),
    "a dict": (of_mapping, {"q": X}, ({"k": X},)),
    "another dict": (of_mapping, {"k": X, "v": X}, ({"q": X},)),
    "a shape": (of_shape, X, (DEEP,)),
    "a class": (of_kind, X, (X.double(),)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_matches_as_the_value_would(name: str) -> None:
    check(*PATTERNS[name])


@functools.singledispatch
def dispatched(x: Any) -> Any:
    return x * 3


@dispatched.register
def _(x: Tensor) -> Any:
    return x * 2


def test_dispatch_by_class() -> None:
    check(lambda m, x: dispatched(m.layer(x)) + dispatched(x), X)


def tried(m: Any, x: Any) -> Any:
    try:
        _, _ = x.shape
    except ValueError:
        return x * 2
    return m.layer(x)


@pytest.mark.parametrize(("x", "other"), [(X, DEEP), (DEEP, X)])
def test_an_unpacking_that_may_fail_decides(x: Tensor, other: Tensor) -> None:
    check(tried, x, (other,))


def swallows(m: Any, x: Any) -> Any:
    try:
        scale = len(x) if x.sum() < 0 else 2
    except (TypeError, ValueError, RuntimeError):
        scale = 7
    return m.layer(x) * scale


def test_no_error_of_the_trace_decides() -> None:
    """A forward may catch the error by which a trace refuses a question: it is raised again at the end of the module."""
    for example in (X, None):
        with pytest.raises(TraceError, match="cannot be traced symbolically"):
            traced(made(swallows), example)
    model = nn.Sequential(nn.Linear(4, 4), made(swallows))
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end="symbolic").eval()
    assert torch.equal(module(X).output, model(X)) and "1" in graphreg.trace(model, X, front_end="symbolic").opaque_modules


def suppresses(m: Any, x: Any) -> Any:
    with suppress(AttributeError):
        return x.mask
    return m.layer(x)


def test_an_attribute_under_suppress() -> None:
    check(suppresses, X)


def two_of(value: Any) -> Any:
    a, b = value
    return a, b


UNPACKED: dict[str, tuple[Forward, Any, Any]] = {
    "rows": (lambda m, x: sum(two_of(x)), X[:2], LONG),
    "a shape": (lambda m, x: x * sum(two_of(x.shape)), X, DEEP),
    "a size": (lambda m, x: x * sum(two_of(x.size())), X, DEEP),
    "unbind": (lambda m, x: sum(two_of(x.unbind())), X[:2], LONG),
    "split": (lambda m, x: two_of(x.split(2)), X, LONG),
    "an argument": (lambda m, x: sum(two_of(x)), (X, X), (X, X, X)),
    "zip": (lambda m, x: sum(a * b for a, b in zip(x, x)), [X, X], [X, X, X]),  # noqa: B905
}


@pytest.mark.parametrize("name", UNPACKED)
def test_unpacking_asserts_the_number_of_items(name: str) -> None:
    function, x, other = UNPACKED[name]
    check(function, x, (other,))
    if name != "zip":
        module = traced(made(function), None)
        torch.testing.assert_close(module(x), made(function)(x))
        with pytest.raises((GraphRegError, ValueError), match=r"expects 2 items in a value .* it has|too many values to unpack"):
            module(other)


def ends(x: Tensor) -> Any:
    *_, h, w = x.shape
    return x * h + w


def ends_with_dtype(x: Tensor) -> Any:
    n, *_, w, dtype = *x.shape, x.dtype
    return (x * n + w).to(dtype)


def beginning(x: Tensor) -> Any:
    n, *_ = x.shape
    return x * n


def all_of_them(x: Tensor) -> Any:
    n, w, two = *x.shape, 2
    return x.view(w, n) * two


def by_name(x: Tensor) -> Any:
    *rest, w = x.shape
    return x * w * eval("len(rest)")


def middle(x: Tensor) -> Any:
    n, *rest = x.shape
    return x.view(n, *rest) * 2


@pytest.mark.parametrize("function", [ends, ends_with_dtype, beginning, all_of_them])
def test_a_starred_variable_that_nothing_reads_gets_any_number_of_items(function: Any) -> None:
    module, shapes = traced(made(lambda m, x: function(x)), None), [(3, 2), (4, 3)]
    for shape in shapes if function is all_of_them else [*shapes, (2, 3, 4), (5, 1, 2, 2)]:
        x = torch.randn(shape)
        torch.testing.assert_close(module(x), made(lambda m, x: function(x))(x))
    short = torch.randn(2, 1, 1) if function is all_of_them else torch.tensor(1.0)
    with pytest.raises(OtherInputs, match=r"expects (at least )?\d items in a value"):
        module(short)


def test_a_starred_variable_that_is_read_has_items_that_are_known() -> None:
    for function in (middle, by_name):
        module = traced(made(lambda m, x, function=function: function(x)), None)  # its part that reads it is opaque
        for x in (torch.randn(2, 3), torch.randn(2, 3, 4)):
            assert torch.equal(module(x), function(x))
    check(lambda m, x: middle(x), torch.randn(2, 3, 4), (torch.randn(3, 2),))


def test_what_always_has_so_many_items_is_not_asserted() -> None:
    def forward(m: Any, x: Any) -> Any:
        (a, b), (c, d), (values, places) = x.chunk(2, -1), x.split([1, 3], -1), x.topk(2)
        h, (state, cell) = m.recurrent(x)
        return a + b, c, d, values + places, h, state + cell

    code = traced(made(forward), None).code
    assert "decided" not in code and "len" not in code


CONTAINERS: dict[str, tuple[Forward, Any, tuple[Any, ...]]] = {
    "None in a tuple": (lambda m, x: m.layer(x[0]) if x[1] is None else x[0] * x[1], (X, None), ((X, X),)),
    "None in a dict": (lambda m, x: m.layer(x["x"]) if x["m"] is None else x["x"], {"x": X, "m": None}, ({"x": X, "m": X},)),
    "None in a named tuple": (lambda m, x: m.layer(x.q) if x.k is None else x.q, Pair(X, None), (Pair(X, X),)),
    "get": (lambda m, x: m.layer(x["x"]) if x.get("m") is None else x["x"], {"x": X}, ({"x": X, "m": X},)),
    "in": (lambda m, x: m.layer(x["x"]) if "m" not in x else x["x"], {"x": X}, ({"x": X, "m": X},)),
    "items": (lambda m, x: [m.layer(v) for k, v in x.items() if k != "m"], {"x": X, "m": X}, ({"x": X},)),
    "keys": (lambda m, x: [m.layer(x[k]) for k in x], {"x": X}, ({"x": X, "m": X},)),
    "its length": (lambda m, x: x["x"] * len(x), {"x": X}, ({"x": X, "m": X},)),
    "keywords": (lambda m, x: F.linear(**x), {"input": X, "weight": X}, ()),
    "True": (lambda m, x: m.layer(x[0]) if x[1] is True else x[0], (X, True), ((X, False),)),
    "a dtype": (lambda m, x: m.layer(x[0]) if x[1] is torch.half else x[0], (X, torch.half), ((X, torch.float),)),
    "a member of an enum": (lambda m, x: m.layer(x[0]) if x[1] is Mode.A else x[0], (X, Mode.A), ((X, Mode.B),)),
    "an empty one": (lambda m, x: m.layer(x[0]) if x[1] else x[0], (X, {}), ()),
    "its class": (lambda m, x: x["x"] * (2 if type(x) is dict and not hasattr(x, "shape") else 3), {"x": X}, ()),
    "a tuple's class": (lambda m, x: x[0] * (2 if type(x) is tuple and not hasattr(x, "shape") else 3), (X, X), ()),
    "a named tuple's": (lambda m, x: x.q * (2 if hasattr(x, "k") and not hasattr(x, "v") else 3), Pair(X, X), ()),
    "torch.jit.isinstance": (lambda m, x: x[0] * (2 if torch.jit.isinstance(x, typing.List[Tensor]) else 3), [X, X], ()),  # noqa: UP006
    "an ordered dict": (lambda m, x: x["x"] * (2 if x.get("k", 1) == 1 else 3), collections.OrderedDict(x=X), ()),
}  # fmt: skip
KNOWN_BY_EXAMPLE = {  # ``is`` calls no method of a stand-in
    "None in a tuple", "None in a dict", "None in a named tuple", "get", "True", "a dtype", "a member of an enum",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_what_it_is_in_the_example(name: str) -> None:
    function, x, others = CONTAINERS[name]
    if name not in KNOWN_BY_EXAMPLE:
        check(function, x, others)
        return
    module = traced(made(function), (x,))
    torch.testing.assert_close(module(x), made(function)(x))
    for other in others:
        with pytest.raises(GraphRegError):
            module(other)


class EmptyDefaults(Model):
    def forward(self, x: Any, extra: dict[str, Any] = {}, more: Any = (), act: Any = torch.relu, *, last: Any = F.gelu) -> Any:  # noqa: B006
        return last(act(self.layer(x))) * (2 if extra or more else 3)


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_defaults_that_are_empty_or_functions(front_end: Any) -> None:
    model = made(print, EmptyDefaults)
    for example in (X, None)[: 2 if front_end == "symbolic" else 1]:
        module = graphreg.regularize(model, weight_l2=0.1, example_inputs=example, front_end=front_end).eval()
        assert torch.equal(module(X).output, model(X))
        assert torch.equal(module(X, {}, act=torch.relu).output, model(X))
        for other in ({"act": torch.tanh}, {"extra": {"a": 1}}):
            with pytest.raises(GraphRegError, match=r"was (specialized to )?.* when the model was traced"):
                module(X, **other)


class Kind(float):
    pass


OTHER = torch.arange(4.0)


class TensorDefaults(Model):
    def forward(self, x: Any, t: Any = torch.ones(4), n: Any = numpy.float64(2.0), pair: Any = (X[1], 2.0), *, last: Any = X[2]) -> Any:  # noqa: B008
        return (self.layer(x) + t * pair[0] * pair[1]) * n * numpy.float32(0.5) * Kind(3.0) + last


@pytest.mark.parametrize("way", ["symbolic", "export", "without inputs"])
def test_defaults_and_numbers_that_code_cannot_write(way: Any) -> None:
    model = made(print, TensorDefaults)
    options: dict[str, Any] = {} if way == "without inputs" else {"example_inputs": X, "front_end": way}
    module = graphreg.regularize(model, weight_l2=0.1, **options).eval()
    copied = pickle.loads(pickle.dumps(module))
    for each in (module, copied, *([torch.compile(module, backend="eager")] if way == "symbolic" else [])):
        assert torch.equal(each(X).output, model(X))
        assert torch.equal(each(X, OTHER).output, model(X, OTHER))
    assert torch.equal(module(X, last=X[0]).output, model(X, last=X[0]))
    with pytest.raises(GraphRegError, match="arguments of this call have the structure"):
        module(X, pair=(OTHER, 3.0))


def test_such_defaults_in_place() -> None:
    model = made(print, TensorDefaults).train()
    assert torch.equal(made(print, TensorDefaults)(X), model(X))
    graphreg.regularize_(model, weight_l2=0.1, penalties="return")
    for call in ((X,), (X, OTHER), (X,)):
        assert torch.equal(model(*call).output, made(print, TensorDefaults)(*call))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_a_question_about_the_layout_is_asserted(front_end: Any) -> None:
    model = made(lambda m, x: (h := m.layer(x).t().contiguous().t()) * (2 if x.is_contiguous() and not h.is_contiguous() else 3))
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X[:, :4].clone(), front_end=front_end).eval()
    x = torch.randn(5, 4)
    assert torch.equal(module(x).output, model(x))
    with pytest.raises(GraphRegError, match="the model decides something"):
        module(torch.randn(4, 5).t())


@pytest.mark.parametrize("index", [slice(None, -1), (slice(-1, 1), slice(-2, None))])
def test_a_batch_of_one_of_which_export_allows_no_other(index: Any) -> None:
    model, x = made(lambda m, x: m.layer(x[index].sum(0).repeat(2)[:4])), X[:1]
    module = graphreg.regularize(model, missing="ignore", weight_l2=0.1, example_inputs=x, front_end="export").eval()
    assert torch.equal(module(x).output, model(x))


class Hostile:
    """An object of a library that is imported lazily: whoever looks at it gets an error of that library."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"the search asked for {name}")


class MoreHostile:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"the search asked for {name}")

    __hash__ = None  # type: ignore[assignment]
    __eq__ = __len__ = __bool__ = __iter__ = __repr__ = lambda self, *more: self.anything  # type: ignore[assignment]


class Called(Hostile):
    def __call__(self, *args: Any) -> Any:
        raise RuntimeError("called")


class HostileClass(type):
    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(f"the search asked for {name}")


class LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


HOSTILE = [
    Hostile(), MoreHostile(), Called(), HostileClass("Lazy", (), {}), LazyModule("lazy"), functools.partial(Called()), [MoreHostile()],
]  # fmt: skip
CODE = """
from torch import nn

class Uses(nn.Module):
    of_class = thing

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, default=None):
        if x is None:
            return thing.part, thing(x), helper(), self.of_class
        return self.layer(x)

def helper(default=thing):
    return thing.other
"""


@pytest.mark.parametrize(("number", "front_end"), [*((number, "symbolic") for number in range(len(HOSTILE))), (1, "export"), (4, "export")])
def test_a_search_runs_no_code_of_the_objects_that_it_finds(number: int, front_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = ModuleType("home_of_hostile_things")
    monkeypatch.setitem(sys.modules, home.__name__, home)
    vars(home)["thing"] = HOSTILE[number]
    exec(CODE, vars(home))
    model = vars(home)["Uses"]()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end=front_end)
    assert torch.equal(module(X).output, model(X))


class Marked(nn.Module):
    """Its tensors, and those of its calls, may have attributes that somebody has set."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.plain = nn.Linear(4, 4), torch.ones(4)
        self.register_buffer("buffer", torch.ones(4))
        self.hid.weight.gain = self.buffer.gain = self.plain.gain = 2.0


MARKED: dict[str, Callable[[Any, Tensor], float]] = {
    "a parameter": lambda m, x: m.hid.weight.gain,
    "a buffer": lambda m, x: m.buffer.gain,
    "a tensor": lambda m, x: m.plain.gain,
    "hasattr of a parameter": lambda m, x: 2.0 if hasattr(m.hid.weight, "gain") else 1.0,
    "hasattr of a buffer": lambda m, x: 2.0 if hasattr(m.buffer, "gain") else 1.0,
    "an argument": lambda m, x: x.gain,
    "an argument, with a default": lambda m, x: getattr(x, "gain", 1.0),
    "hasattr of an argument": lambda m, x: 2.0 if hasattr(x, "gain") else 1.0,
}


@pytest.mark.parametrize(
    ("name", "prove"), [*((name, True) for name in MARKED), ("a parameter", False), ("an argument, with a default", False)]
)
def test_attributes_that_somebody_has_set_on_a_tensor(name: str, prove: bool) -> None:
    kind = type("Marked", (Marked,), {"forward": lambda m, x: m.hid(x) * MARKED[name](m, x)})
    torch.manual_seed(0)
    model, placed = kind(), graphreg.regularize_(kind(), weight_l2=0.0, scale=1, prove=prove)
    placed.load_state_dict(model.state_dict())
    x, plain = torch.randn(3, 4), torch.randn(3, 4)
    x.gain = 3.0  # type: ignore[attr-defined]
    module = graphreg.regularize(model, weight_l2=0.0, example_inputs=x, prove=prove)
    assert torch.equal(module(x).output, model(x)) and torch.equal(placed(x), model(x))
    assert "the model itself raises" not in str(graphreg.report(module))
    if name != "an argument":
        assert torch.equal(placed(plain), model(plain))


def dynamo_notices_attributes_of_tensors() -> bool:
    plain, x = Marked(), torch.ones(4)
    call = torch.compile(lambda x: x * getattr(plain.buffer, "later", 1.0), backend="eager")
    before = call(x)
    plain.buffer.later = 2.0  # type: ignore[attr-defined]
    return not torch.equal(call(x), before)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_attribute_that_is_set_on_a_tensor_of_the_model_later(compiled: bool) -> None:
    kind = type("Marked", (Marked,), {"forward": lambda m, x: m.hid(x) * getattr(m.buffer, "later", 1.0)})
    module, placed, x = graphreg.regularize(kind(), weight_l2=0.0), graphreg.regularize_(kind(), weight_l2=0.0, scale=1), torch.randn(3, 4)
    call = torch.compile(placed, backend="eager") if compiled else placed
    if compiled and not dynamo_notices_attributes_of_tensors():
        pytest.skip("this torch.compile keeps what it has read of a tensor's attribute, as does plain code: torch 2.10")
    for value in (None, 2.0) if compiled else (None, 2.0, 3.0):
        if value is not None:
            placed.buffer.later = value
        assert torch.equal(call(x), kind.forward(placed, x))  # type: ignore[attr-defined]
    module(x)
    module.buffer.later = 2.0
    with pytest.raises(GraphRegError, match="asks whether a value has the attribute 'later'"):
        module(x)


class Masked(nn.Module):
    """Fills what a mask leaves out with the least number of the dtype that the scores have at this call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x)
        scores = (q @ q.mT).masked_fill(mask == 0, torch.finfo(q.dtype).min)
        y: Tensor = self.o(scores.softmax(-1) @ q)
        return y.clamp(max=-torch.iinfo(mask.dtype).min)


def test_the_limits_of_a_dtype() -> None:
    """One graph, right in each dtype and under autocast; what stands for torch.finfo is gone afterwards."""
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 0, 1]] * 3)
    plain, model = Masked(), Masked()
    for example in ((x, mask), None):
        module = graphreg.regularize(model, weight_l2=0.1, hidden_dropout=0.0, example_inputs=example)
        assert "torch.finfo(getattr_" in module.code and torch.finfo(torch.float16).bits == 16 and isinstance(torch.finfo, type)
        assert all(site.kind != "value" or site.role != "hidden" for site in graphreg.names(model).sites if "info" in site.name)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        for run in (module, compiled):
            assert torch.equal(run(x, mask).output, plain(x, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, mask).output, plain(x, mask))
    assert torch.equal(module.double()(x.double(), mask).output, plain.double()(x.double(), mask))


class SwallowsErrors:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> bool:
        return True


def test_a_block_that_swallows_errors_does_not_hide_what_a_trace_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trace of a process that computes shapes ends at the question, and begins anew with Dynamo's table."""

    def forward(m: Any, x: Any) -> Any:
        y = x
        with SwallowsErrors():
            if x.shape[0] > 30:
                raise ValueError("too many")
            y = m.layer(x)
        return torch.relu(y)

    answers = [False]
    monkeypatch.setattr("graphreg.tracing.shape_decisions.has_function_table", lambda: answers.pop() if answers else True)
    model, x = made(forward), torch.linspace(-1, 1, 12).view(3, 4)
    assert torch.equal(traced(model, x)(x), model(x)) and not answers


def with_a_default_of_its_own(forward: Forward) -> Forward:
    """As decorators of transformers do: it looks among the keywords alone."""

    @functools.wraps(forward)
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs["scale"] = kwargs.get("scale") or 3.0
        return forward(self, *args, **kwargs)

    return called


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @with_a_default_of_its_own
    def forward(self, x: Any = None, scale: float | None = None) -> Any:
        return self.layer(x) * scale


def test_optional_arguments_are_passed_by_keyword() -> None:
    """Passed by position, ``scale`` would be there twice."""
    model = Decorated()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs={"x": X}, front_end="symbolic")
    assert torch.equal(module(x=X).output, model(x=X))
