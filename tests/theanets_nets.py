"""What theanets computed (data/theanets.json), its networks as torch modules in float64, and its names in graphreg's words.

A layer keeps theanets' parameter names and its (in, out) weights. The outputs ``X:out`` and ``X:pre`` of a theanets layer
are the value of the module ``X`` and of its submodule ``X.pre``; the input ``in``, a keyword of Python, is called ``in_``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphreg
from graphreg import passes

Record = dict[str, Any]
# read-only views, in which a trace need not look for what a forward changes
GOLDEN: Mapping[str, Any] = MappingProxyType(json.loads((Path(__file__).parent / "data" / "theanets.json").read_text()))
NETWORKS: Mapping[str, Record] = MappingProxyType(GOLDEN["networks"])
TOLERANCE = 1e-9

# theanets' keys that graphreg knows, and those it does not know (yet): records of the latter are not looked at
PRESENT = graphreg.registered().spellings
ABSENT = frozenset(GOLDEN["observed"]["registry"]["keys"]) - PRESENT - {"regularizer"}  # the base class is a row, below


class Row(Enum):
    """The deliberate differences that concern the regularizers here: what theanets does | what graphreg does."""

    STREAMS = "every random regularizer starts the stream of seed 13: masks repeat between sites | a stream per site"
    NOTHING = "a pattern that matches nothing, an unknown keyword, a single instance: silently ignored | error, error, accepted"
    COMBINED = "`regularizers=[…]` drops all other keywords | combined"
    COPIES = "saved copies (`hid1:out-predrop`) match later globs | additions are never matched"
    TRAIN = "noise at validation and on softmax outputs without a word | train mode only"
    DISJOINT = "a second input layer counts as input and as hidden: dropped twice | roles are disjoint"
    RANGE = "dropout 1.0 gives nan; negative rates pass | error"
    HIDDEN = "noise and dropout default to `*:out`: inputs and outputs too | hidden sites"
    ZERO = (
        "`weight_l2=0` makes a regularizer of weight 0 | "
        "a scalar 0 is off; a dict or an instance with weight 0 is spliced, to be raised later"
    )
    ZERO_IN_A_MAP = "`dropout={name: 0}` is left out | spliced with strength 0, to be raised later; None is off"
    SQUARED = "RecurrentNorm has no square, so it telescopes and can be negative | squared"
    SEQUENCES = "recurrent penalties accept 2-D values and difference neighbouring units; T = 1 gives nan | error; 0"
    TRAINS = "a penalty on what no parameter reaches is a constant in the loss | error"  # DESIGN.md, section 8; no row there
    CONTRACTIVE = (
        "Contractive is (∂ mean(h)/∂x)²: it shrinks with the batch squared, and opposite units cancel; its default pattern crashes; "
        "unequal inputs crash; `wrt` that matches nothing gives nan | "
        'true Frobenius norm; the old form as `estimator="mean"`; default hidden; sum over inputs; error'
    )
    VALUES = "names of saved copies, inner outputs (`:pre`, `:cell`) exist in every layer | a site is a value of the traced graph"


# --- the networks ---------------------------------------------------------------------------------------------------


def _prelu(z: Tensor, leak: Tensor) -> Tensor:
    return torch.relu(z) + torch.exp(leak) * (z - torch.abs(z)) / 2


def _maxout(z: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    return (z.unsqueeze(-1) * slope + intercept).amax(-1)


def _elu(z: Tensor, gain: Tensor) -> Tensor:
    return torch.where(z >= 0, z, torch.exp(gain) * torch.expm1(z))


def _z_scores(z: Tensor) -> Tensor:
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, correction=0, keepdim=True) + 1e-8)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh, "logistic": torch.sigmoid, "relu": torch.relu, "softplus": F.softplus,
    "prelu": _prelu, "maxout:2": _maxout, "elu": _elu, "norm:z": _z_scores,
}  # fmt: skip


class Layer(nn.Module):
    """``activation(x @ w + b)``, summed over inputs; further parameters belong to the activation."""

    def __init__(self, parameters: Mapping[str, Any], activation: str) -> None:
        super().__init__()
        for name, value in parameters.items():  # a two-input layer's are called w_in:out, w_in2:out
            self.register_parameter(name, nn.Parameter(tensor(value)))
        self.weights = [name for name in parameters if name.startswith("w")]
        self.more = [name for name in parameters if name not in (*self.weights, "b")]
        self.pre = nn.Identity()
        # "linear" is a module, so that out:out and out:pre are two values, as they are in theanets
        self.activation = nn.Identity() if activation == "linear" else ACTIVATIONS[activation]

    def forward(self, *inputs: Tensor) -> Tensor:
        products = [x @ getattr(self, name) for x, name in zip(inputs, self.weights, strict=True)]
        pre = self.pre(sum(products[1:], products[0]) + self.b)
        return self.activation(pre, *(getattr(self, name) for name in self.more))


# theanets' scan is one operation of its graph, and of ours: the steps inside it are no sites
def rnn_scan(x: Tensor, xh: Tensor, hh: Tensor, b: Tensor, activation: str) -> tuple[Tensor, ...]:
    """[batch, time, in] -> out and pre, each [batch, time, unit]."""
    h, steps = x.new_zeros(len(x), len(hh)), []
    for x_t in x.unbind(1):
        pre = x_t @ xh + b + h @ hh
        h = ACTIVATIONS[activation](pre)
        steps.append((h, pre))
    return tuple(torch.stack(values, 1) for values in zip(*steps, strict=True))


def gru_scan(x: Tensor, w: Tensor, b: Tensor, *, hh: Tensor, hr: Tensor, hz: Tensor) -> tuple[Tensor, ...]:
    """[batch, time, in] -> out, pre, hid and rate, each [batch, time, unit]. The reset comes before the product."""
    h, steps = x.new_zeros(len(x), len(hh)), []
    for x_t in (x @ w + b).unbind(1):
        to_hidden, to_reset, to_rate = x_t.chunk(3, -1)
        rate = torch.sigmoid(to_rate + h @ hz)
        pre = to_hidden + (torch.sigmoid(to_reset + h @ hr) * h) @ hh
        hid = torch.tanh(pre)
        h = (1 - rate) * h + rate * hid
        steps.append((h, pre, hid, rate))
    return tuple(torch.stack(values, 1) for values in zip(*steps, strict=True))


fx.wrap("rnn_scan")
fx.wrap("gru_scan")


class Recurrent(nn.Module):
    """A scan; its inner outputs go through submodules, so that they have names."""

    def __init__(self, parameters: Mapping[str, Any], activation: str) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor(value)))
        self.pre, self.kind = nn.Identity(), activation


class RNN(Recurrent):
    xh: Tensor
    hh: Tensor
    b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out, pre = rnn_scan(x, self.xh, self.hh, self.b, self.kind)
        self.pre(pre)
        return out


class GRU(Recurrent):
    w: Tensor
    b: Tensor
    hh: Tensor
    hr: Tensor
    hz: Tensor

    def __init__(self, parameters: Mapping[str, Any], activation: str) -> None:
        super().__init__(parameters, activation)
        self.hid, self.rate = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out, pre, hid, rate = gru_scan(x, self.w, self.b, hh=self.hh, hr=self.hr, hz=self.hz)
        self.pre(pre), self.hid(hid), self.rate(rate)
        return out


class Chain(nn.Module):
    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def through(self, *values: Tensor) -> Tensor:
        for layer in self.children():
            values = (layer(*values),)
        return values[0]


class OneInput(Chain):
    def forward(self, in_: Tensor) -> Tensor:
        return self.through(in_)


class TwoInputs(Chain):
    def forward(self, in_: Tensor, in2: Tensor) -> Tensor:
        return self.through(in_, in2)


FORMS = {"ff": Layer, "rnn": RNN, "gru": GRU}


def network(name: str) -> nn.Module:
    """A network with the parameters that theanets drew, in train mode."""
    record = NETWORKS[name]
    layers = {}
    for layer in record["layers"]:
        if layer["form"] != "input":
            parameters = {path.partition(".")[2]: record["params"][path] for path in layer["params"]}
            layers[layer["name"]] = FORMS[layer["form"]](parameters, layer["activation"])
    return (TwoInputs if len(record["inputs"]) > 1 else OneInput)(layers)


@cache
def traced(name: str) -> graphreg.Traced:
    """The trace of a network, for all who change nothing in it."""
    return graphreg.trace(network(name))


def inputs(name: str) -> tuple[Tensor, ...]:
    return tuple(tensor(value) for value in NETWORKS[name]["inputs"].values())


def loss(name: str, output: Tensor) -> Tensor:
    """The mean squared error against the network's target, over all elements."""
    return F.mse_loss(output, tensor(NETWORKS[name]["target"]))


# --- names ----------------------------------------------------------------------------------------------------------


def site_name(output: str) -> str:
    """The site of a theanets output: ``hid1:out`` is ``hid1``, ``hid1:pre`` is ``hid1.pre``, ``in:out`` is ``in_``."""
    layer, _, port = output.partition(":")
    layer = "in_" if layer == "in" else layer
    return layer if port == "out" else f"{layer}.{port}"


def output_name(site: graphreg.Site, name: str) -> str:
    """The theanets output (or parameter) that a site of a network is; its own name where it is none."""
    found = [output for output in NETWORKS[name]["output_order"] if site_name(output) in site.names]
    return found[0] if found else site.name


def selector(pattern: Any, name: str) -> Any:
    """A theanets selector of outputs as graphreg writes it. ``X:*`` asks for every output that the network's layers have."""
    if not isinstance(pattern, str):
        texts = [selector(one, name) for one in pattern]
        return tuple(text for one in texts for text in ((one,) if isinstance(one, str) else one))
    layer, colon, port = pattern.partition(":")
    if not colon:
        return pattern
    layer = "in_" if layer == "in" else layer
    ports = dict.fromkeys(output.partition(":")[2] for output in NETWORKS[name]["output_order"])
    found = tuple(f"{layer}:out" if p == "out" else f"{layer}.{p}" for p in ports if fnmatchcase(p, port))
    return found[0] if len(found) == 1 else found


def options(key: str, given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A regularizer's options in graphreg's words; parameters have the same names in both."""
    on_values = graphreg.registered()[key.lower()].on == "values"
    named = {k: selector(v, name) if k == "pattern" and on_values else v for k, v in given.items()}
    if named.get("wrt") == "in":  # an input's variable in theanets, not its output
        named["wrt"] = "in_"
    return named | ({"estimator": "mean"} if key.lower() == "contractive" else {})  # theanets' code


def keywords(source: str, name: str) -> dict[str, Any]:
    """The keywords of a record, which stand there as Python, in graphreg's words; those that graphreg lacks are left out."""
    given = eval(f"dict({source})", {"R": passes, "np": SimpleNamespace(random=SimpleNamespace(RandomState=RandomState))})
    return _translated(given, name)


class RandomState:
    """Stands in for numpy's in a record that gives one as ``rng``."""

    def __init__(self, seed: int) -> None:
        self.seed = seed


def _translated(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key.lower() in ABSENT:
            continue
        if key in ("dropout", "noise") and isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else value
            found[key] = type(value)((selector(pattern, name), rate) for pattern, rate in pairs)
        elif key == "regularizers" and isinstance(value, dict):
            found[key] = _translated(value, name)
        else:
            scalar = {"weight": value} if key == "contractive" else value
            found[key] = options(key, value if isinstance(value, dict) else scalar, name) if isinstance(scalar, dict) else value
    return found


def weights(name: str) -> list[str]:
    """A network's parameters of 2 dims, which weight penalties act on."""
    return [path for path, value in NETWORKS[name]["params"].items() if isinstance(value[0], list)]


def matched(kind: str, pattern: Any, name: str) -> set[str]:
    """What theanets' own rule selects in a network: outputs, or the parameters that count as weights."""
    record = NETWORKS[name]
    globs: list[str] = [pattern] if isinstance(pattern, str) else pattern
    if kind.startswith("Weight"):
        names = weights(name)
    elif pattern == "*" and kind in ("HiddenL1", "Contractive"):
        return {f"{layer['name']}:out" for layer in record["layers"][1:-1]}
    else:
        names = record["output_order"]
    return {one for one in names if any(fnmatchcase(one, glob) for glob in globs)}


def selected(traced: graphreg.Traced, regularizer: graphreg.Regularizer, name: str) -> set[str]:
    """What graphreg selects in a network, by theanets' names."""
    return {output_name(edit.site, name) for edit in graphreg.plan(traced, [regularizer]).edits}


# --- numbers --------------------------------------------------------------------------------------------------------


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def assert_close(ours: Tensor, theirs: Any, what: str) -> None:
    """Agreement to 1e-9, absolute. ``theirs`` may be a number, a nested list, or theanets' "nan"."""
    golden = theirs.detach() if isinstance(theirs, Tensor) else tensor(float(theirs) if isinstance(theirs, str) else theirs)
    torch.testing.assert_close(ours.detach().double(), golden, rtol=0, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def gradients(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The gradient for each parameter; zeros where there is no path."""
    parameters = dict(model.named_parameters())
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_gradients(value: Tensor, model: nn.Module, theirs: Mapping[str, Any], what: str) -> None:
    """Agreement for each parameter; null in the record is "not connected"."""
    ours = gradients(value, model)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        golden = theirs[name]
        assert_close(gradient, torch.zeros_like(gradient) if golden is None else golden, f"{what}, gradient of {name}")


def plus(gradient: Mapping[str, Any], factor: float, term: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """``gradient + factor * term``, parameter by parameter."""
    found = {name: value if isinstance(value, Tensor) else tensor(value) for name, value in gradient.items()}
    for name, value in (term or {}).items():
        if value is not None:
            found[name] = found[name] + factor * tensor(value)
    return found


class Telescoping(graphreg.Penalty):
    """RecurrentNorm as theanets' code has it, without the square: what the engine makes of sequences, held against its numbers."""

    time_axis: int = 1
    theirs = "RecurrentNorm"

    def __call__(self, steps: Tensor) -> Tensor:
        return -steps.square().sum(-1).diff(dim=0).mean()


def squared_norms(values: Mapping[str, Any]) -> Tensor:
    """The formula of theanets' documentation, averaged as its code averages: over outputs, batch and time - 1."""
    terms = []
    for value in values.values():  # [batch, time, unit]
        norms = (value * value).sum(-1)
        terms.append(((norms[:, 1:] - norms[:, :-1]) ** 2).mean())
    return sum(terms[1:], terms[0]) / len(terms)


class Probe(graphreg.Penalty):
    """Measures nothing; ``seen`` keeps the values of its sites, after the splices there (``clean``: before)."""

    seen: Any = None

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        self.seen.update(values)
        return torch.zeros(())


def probe(name: str, clean: bool = False) -> Probe:
    """A probe on every theanets output of a network."""
    outputs = tuple(site_name(output) for output in NETWORKS[name]["output_order"])
    return Probe(outputs, 1.0, clean=clean, seen={}, name="clean" if clean else "seen")


def seen(found: Probe, traced: graphreg.Traced, name: str) -> dict[str, Tensor]:
    """What a probe saw, by theanets' names."""
    sites = {site.name: site for site in traced.values}
    return {output_name(sites[site], name): value for site, value in found.seen.items()}
