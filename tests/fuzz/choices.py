"""Random regularizers with random selectors, and the sites that they should find."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fuzz.matching import Place, select
from fuzz.strengths import Plain, written

FIRST_SPLICES = ("BernoulliDropout", "GaussianNoise")
LATER_SPLICES = ("ChannelDropout", "GaussianDropout", "AlphaDropout", "LayerDrop", "DropPath", "NEFTune")
SPLICES = (*FIRST_SPLICES, *LATER_SPLICES)  # at values
ON_READS = ("WeightNoise", "DropConnect", "EmbeddingDropout")  # splices on parameters
FIRST_KEYS = {
    "BernoulliDropout": "dropout", "GaussianNoise": "noise", "WeightL2": "weight_l2", "WeightL1": "weight_l1", "HiddenL1": "hidden_l1",
    "RecurrentNorm": "recurrent_norm", "RecurrentState": "recurrent_state", "Contractive": "contractive",
}  # fmt: skip
KEYS = FIRST_KEYS | {
    "ChannelDropout": "channel_dropout", "GaussianDropout": "gaussian_dropout", "AlphaDropout": "alpha_dropout",
    "LayerDrop": "layer_drop", "DropPath": "drop_path", "NEFTune": "neftune", "WeightNoise": "weight_noise",
    "DropConnect": "drop_connect", "EmbeddingDropout": "embedding_dropout", "HiddenL2": "hidden_l2", "KLSparsity": "kl_sparsity",
    "HoyerSquare": "hoyer_square", "DeCov": "decov", "Covariance": "covariance", "VarianceFloor": "variance_floor",
    "ConfidencePenalty": "confidence", "ZLoss": "z_loss", "ElasticNet": "elastic_net", "GroupLasso": "group_lasso",
    "Orthogonality": "orthogonality", "MaxNorm": "max_norm", "L2SP": "l2_sp", "SpectralPenalty": "spectral",
}  # fmt: skip
STATEFUL = ("L2SP", "SpectralPenalty")
ON_WEIGHTS = ("WeightL2", "WeightL1", "ElasticNet", "GroupLasso", "Orthogonality", "MaxNorm", *STATEFUL)  # penalties
STEPS = ("RecurrentNorm", "RecurrentState")


@dataclass(frozen=True)
class Reg:
    """One regularizer as plain data. ``axes``: of time, by site, where it is one on sequences; ``calls``: the cell whose calls are one."""

    kind: str
    pattern: tuple[str, ...]
    weight: Plain
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> float:
        """Its strength, where that is a number."""
        assert not isinstance(self.weight, dict)
        return self.weight

    def made(self) -> str:
        """As Python writes it."""
        pattern = self.pattern[0] if len(self.pattern) == 1 else list(self.pattern)
        more = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{self.kind}({pattern!r}, {written(self.weight)}{more})"


@dataclass
class Known:
    """What the generator knows of the sites: values and parameters, the shapes of the values, which roles are sure."""

    values: list[Place]
    parameters: list[Place]
    dims: dict[str, int]
    axes: dict[str, int]  # of recurrent layers' outputs
    cells: dict[str, list[str]]  # by a cell's path, the sites of its calls
    called: dict[str, int]  # by a module's path, how often it is called
    roles_sure: bool
    modes_agree: bool
    inputs: list[str]
    twice: bool = True  # whether all has a second derivative
    convolved: dict[str, bool | None] = field(default_factory=dict)  # by site, whether the axes are a convolution's; None: not told
    recurrent: set[str] = field(default_factory=set)  # sites behind a recurrent layer
    near: dict[str, int | None] = field(default_factory=dict)  # the axis of time of values near a recurrent layer; None: not told
    tokens: list[str] = field(default_factory=list)  # the paths of embeddings that read token ids


@dataclass
class Found:
    """What a regularizer acts on: by site, in order; ``empty``: why it should be refused; ``unsure`` sites may be left out."""

    sites: list[str]
    empty: list[str]
    unsure: set[str]


def usual(kind: str, known: Known, places: Sequence[Place]) -> list[Place]:
    """The default sites of a regularizer."""
    if kind == "EmbeddingDropout":
        return [p for p in places if any(f"{path}.weight" == n.name for path in known.tokens for n in p.names)]
    if kind in ON_WEIGHTS or kind in ON_READS:
        return [p for p in places if p.usable]
    if kind == "NEFTune":
        return [p for p in places if any(n.module in known.tokens for n in p.names)]
    hidden = [p for p in places if p.role == "hidden" and p.usable]
    return hidden if kind in SPLICES else [p for p in hidden if not p.norm]


def found(reg: Reg, known: Known) -> Found:
    """The sites that a regularizer should find."""
    on_parameters = reg.kind in ON_WEIGHTS or reg.kind in ON_READS
    elsewhere = known.values if on_parameters else known.parameters
    if on_parameters:
        tables = reg.kind == "EmbeddingDropout"
        places = [replace(p, usable=p.dims >= 2 and (not tables or any(n.op == "Embedding" for n in p.names))) for p in known.parameters]
    elif reg.kind in SPLICES:
        places = [replace(p, usable=p.usable and (p.used or p.unsure)) for p in known.values]
    else:
        places = list(known.values)
    if reg.kind in STEPS and reg.pattern[0] in known.cells:  # the calls of a cell are the steps of one sequence
        return Found(list(known.cells[reg.pattern[0]]), [], set())
    chosen, empty = select(reg.pattern, places, usual(reg.kind, known, places), elsewhere)
    unsure = {p.name for p in places if p.unsure} if reg.kind in SPLICES else set()
    return Found([p.name for p in chosen], empty, unsure)


def patterns(known: Known, places: Sequence[Place], rng: random.Random, roles: bool) -> tuple[str, ...]:
    """One or several strings, of any form."""
    usable = [p for p in places if p.usable]
    if not usable:
        return ("*",)
    texts = [_text(usable, rng, roles) for _ in range(rng.choice((1, 1, 1, 2)))]
    if rng.random() < 0.15:
        texts.append("!" + rng.choice(usable).names[0].text)
    return tuple(texts)


def _text(usable: Sequence[Place], rng: random.Random, roles: bool) -> str:
    place = rng.choices(usable, [7.0 if p.written else 2.0 if p.role == "hidden" else 1.0 for p in usable])[0]
    name = rng.choice(place.names)
    head = name.name.partition(".")[0]
    port = "" if name.default else f":{rng.choice(name.ports)}"
    forms: list[tuple[float, Callable[[], str]]] = [
        (5, lambda: name.text), (1, lambda: f"{name.name[:2]}*{port}"), (1, lambda: f"*{name.name[-2:]}{port}"), (0.5, lambda: "**"),
        (1, lambda: f"**@{name.op}"), (0.7, lambda: f"{head}.*"), (0.7, lambda: f"{head}.**"),
        (0.5, lambda: f"{name.name}@{name.op}{port}"), (0.4, lambda: f"@{name.op}{port}"), (0.4, lambda: f"{name.name[:-1]}?{port}"),
        (0.4, lambda: f"{name.name}:*"), (0.2, lambda: name.name + "x"),
    ]  # fmt: skip
    if roles:
        forms += [(4, lambda: "*"), (1, lambda: f"**#{place.role or 'hidden'}"), (0.5, lambda: f"{head}**#{place.role or 'output'}")]
    weights = [weight for weight, _ in forms]
    return rng.choices([form for _, form in forms], weights)[0]()


def regularizers(known: Known, rng: random.Random, derivatives: bool = True) -> list[Reg]:
    """One to four of them."""
    kinds = rng.choices(
        [*FIRST_KEYS], [5, 3, 2.5, 1.5, 4, 1, 1, 1 if derivatives and known.twice else 0], k=rng.choice((1, 1, 2, 2, 3, 4))
    )  # fmt: skip
    chosen: list[Reg] = []
    for kind in kinds:
        reg = _sensible(kind, known, rng, [each.pattern for each in chosen if each.kind not in ON_WEIGHTS])
        chosen += [] if reg is None else [reg]
    return chosen


def _sensible(kind: str, known: Known, rng: random.Random, there: list[tuple[str, ...]]) -> Reg | None:
    """One whose sites a parameter reaches, mostly: a penalty elsewhere is refused, as it should be. ``there``: others' selectors."""
    trains = {p.name for p in known.values if p.trains}
    for _ in range(8):
        reg = _one(kind, known, rng)
        if reg is not None and there and kind not in (*ON_WEIGHTS, *STEPS) and rng.random() < 0.35:
            reg = replace(reg, pattern=rng.choice(there))
        if reg is None or kind in SPLICES or kind in ON_WEIGHTS or rng.random() < 0.01:
            return reg
        sites = found(reg, known)
        if sites.empty or trains.intersection(sites.sites):
            return reg
    return None


def _one(kind: str, known: Known, rng: random.Random) -> Reg | None:
    roles = known.roles_sure
    weight = 0.0 if rng.random() < 0.06 else round(rng.uniform(0.05, 0.8), 2)
    if kind in ON_WEIGHTS:
        if not any(p.dims >= 2 for p in known.parameters):
            return None
        pattern = ("*",) if rng.random() < 0.4 else patterns(known, [p for p in known.parameters if p.dims >= 2], rng, False)
        return Reg(kind, pattern, weight, {"reduction": "sum"} if rng.random() < 0.3 else {})
    if kind in STEPS:
        return _steps(kind, known, rng, weight)
    places = known.values if kind not in SPLICES else [replace(p, usable=p.usable and p.used) for p in known.values]
    pattern = patterns(known, places, rng, roles)
    if kind in SPLICES:
        return Reg(kind, pattern, weight, {"rng": rng.randint(0, 99)} if rng.random() < 0.15 else {})
    options: dict[str, Any] = {"clean": True} if rng.random() < 0.25 else {}
    if kind == "Contractive":
        inputs = [p.name for p in known.values if p.role == "input" and p.usable]
        if not inputs:
            return None
        options["estimator"] = rng.choice(("projection", "projection", "exact", "mean"))
        if options["estimator"] == "projection" and rng.random() < 0.3:
            options["n"] = 2
        if rng.random() < 0.2:
            options["always"] = True
        if rng.random() < 0.3:
            options["wrt"] = rng.choice(inputs)
    return Reg(kind, pattern, weight, options)


def _steps(kind: str, known: Known, rng: random.Random, weight: float) -> Reg | None:
    """On a cell's calls, a recurrent layer's output, or a value that has an axis of time."""
    cells = [path for path, calls in known.cells.items() if len(calls) > 1]
    several = {path for path, times in known.called.items() if times > 1}
    values = [
        p for p in known.values
        if p.usable and known.dims.get(p.name, 0) >= 3 and not any(n.module in several for n in p.names) and p.name not in known.axes
        and known.near.get(p.name, 0) is not None
    ]  # fmt: skip
    layers = [p for p in known.values if p.name in known.axes and p.names[0].module not in several]
    options: dict[str, Any] = {"norm": "l2"} if kind == "RecurrentNorm" and rng.random() < 0.4 else {}
    if rng.random() < 0.2:
        options["clean"] = True
    form = rng.choice([*["cell"] * bool(cells), *["layer"] * bool(layers), *["value"] * bool(values)] or ["none"])
    if form == "none":
        return None
    if form == "cell":
        return Reg(kind, (rng.choice(cells),), weight, options)
    if form == "layer":
        return Reg(kind, (rng.choice(layers).name,), weight, options)
    place = rng.choice(values)
    if rng.random() < 0.5:
        options["time_axis"] = rng.choice((0, 1, -1))
    return Reg(kind, (place.name,), weight, options)


def named(regs: Sequence[Reg]) -> list[str]:
    """Their names in order: the first key of each, ``_1``, ``_2`` on repeats."""
    names: list[str] = []
    for reg in regs:
        base, count = KEYS[reg.kind], 0
        while (name := f"{base}_{count}" if count else base) in names:
            count += 1
        names.append(name)
    return names
