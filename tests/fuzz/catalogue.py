"""Random regularizers of version 0.2, mixed with those of 0.1. Their random numbers are their own, so the cases of 0.1 stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fuzz.choices import (
    FIRST_KEYS,
    LATER_SPLICES,
    ON_READS,
    ON_WEIGHTS,
    SPLICES,
    STEPS,
    Known,
    Reg,
    _one,
    found,
    patterns,
)  # fmt: skip
from fuzz.formulas import ON_UNITS
from fuzz.matching import Place

WEIGHTS = {
    "ChannelDropout": 3, "GaussianDropout": 3, "AlphaDropout": 3, "LayerDrop": 3, "DropPath": 3, "NEFTune": 2, "WeightNoise": 4,
    "DropConnect": 4, "EmbeddingDropout": 2, "HiddenL2": 2, "KLSparsity": 2, "HoyerSquare": 2, "DeCov": 2, "Covariance": 2,
    "VarianceFloor": 2, "ConfidencePenalty": 2, "ZLoss": 2, "ElasticNet": 2, "GroupLasso": 2, "Orthogonality": 2, "MaxNorm": 2, "L2SP": 2,
    "SpectralPenalty": 2,
}  # fmt: skip
FIRST = {"BernoulliDropout": 4, "GaussianNoise": 3, "WeightL2": 1, "HiddenL1": 2, "RecurrentState": 1, "Contractive": 1}
SHARING = ("BernoulliDropout", "GaussianNoise", "GaussianDropout", "AlphaDropout")
SQUASHED = ("sigmoid", "softmax", "Sigmoid")


def regularizers(known: Known, rng: random.Random) -> list[Reg]:
    """One to four, at least one of them new or with a new option."""
    count = rng.choice((1, 1, 2, 2, 3, 4))
    kinds = rng.choices([*WEIGHTS], [_weight(kind, known) for kind in WEIGHTS], k=count)
    kinds = [kind if not i or rng.random() < 0.6 else rng.choices([*FIRST], [*FIRST.values()])[0] for i, kind in enumerate(kinds)]
    chosen: list[Reg] = []
    for kind in kinds:
        reg = _sensible(kind, known, rng, chosen)
        chosen += [] if reg is None else [reg]
    return chosen


def _weight(kind: str, known: Known) -> float:
    """What few models can have comes more often in those that can."""
    rare = bool(known.tokens) and kind in ("NEFTune", "EmbeddingDropout")
    rare |= True in known.convolved.values() and kind in ("DeCov", "Covariance", "VarianceFloor", "ZLoss")
    rare |= any(len(place.names) > 1 for place in known.parameters) and kind in ON_READS
    return WEIGHTS[kind] * (4 if rare else 1)


# whose default sites are not told here
UNTOLD = ("ChannelDropout", "DropPath", "LayerDrop", "NEFTune", "ConfidencePenalty", "ZLoss", "KLSparsity")


def _sensible(kind: str, known: Known, rng: random.Random, there: Sequence[Reg]) -> Reg | None:
    """One whose sites a parameter reaches, mostly; a third of them at the sites of another."""
    trains = {p.name for p in known.values if p.trains}
    for _ in range(8):
        reg = _one(kind, known, rng) if kind in FIRST_KEYS else _new(kind, known, rng)
        if reg is None:
            continue
        same = [r.pattern for r in there if _place(r.kind) == _place(kind) and (kind not in UNTOLD or _told(r.pattern))]
        if same and kind not in (*STEPS, "NEFTune", "EmbeddingDropout", "LayerDrop", *ON_UNITS) and rng.random() < 0.35:
            reg = replace(reg, pattern=rng.choice(same), options={k: v for k, v in reg.options.items() if k != "share_axes"})
        if kind in SHARING and rng.random() < 0.35:
            reg = _shared(reg, known, rng)
        if _place(kind) != "value" or kind in SPLICES or rng.random() < 0.02:
            return reg
        sites = found(reg, known)
        if sites.empty or trains.intersection(sites.sites):
            return reg
    return None


def _place(kind: str) -> str:
    return "parameter" if kind in ON_WEIGHTS else "read" if kind in ON_READS else "value"


def _new(kind: str, known: Known, rng: random.Random) -> Reg | None:
    weight = 0.0 if rng.random() < 0.05 else round(rng.uniform(0.05, 0.8), 2)
    options: dict[str, Any] = {}
    if kind in ON_WEIGHTS or kind in ON_READS:
        options = _of_parameters(kind, rng)
        pattern = _parameters(kind, known, rng)
    else:
        pattern = _values(kind, known, rng)
        if kind == "NEFTune":
            weight = round(rng.uniform(0.5, 6), 2)
    if pattern is None:
        return None
    if kind in (*LATER_SPLICES, *ON_READS):
        options |= {"rng": rng.randint(0, 99)} if rng.random() < 0.15 else {}
    elif kind not in ON_WEIGHTS:
        options |= {"clean": True} if rng.random() < 0.25 else {}
    reg = Reg(kind, pattern, weight, options)
    if kind in ON_UNITS:
        return _of_units(reg, known, rng)
    # axis 0 is refused where it may be time, and axis 1 where it is time or channels; -1 is never the default
    if kind == "DropPath" and (known.near or rng.random() < 0.4):
        axes_are_sure = known.near or any(each is not False for each in known.convolved.values()) or known.recurrent
        return replace(reg, options={**options, "batch_axis": -1 if axes_are_sure else rng.choice((1, -1))})
    return reg


def _of_parameters(kind: str, rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"reduction": "sum"} if kind in ON_WEIGHTS and rng.random() < 0.3 else {}
    if kind == "ElasticNet" and rng.random() < 0.6:
        options["l1_ratio"] = rng.choice((0.0, 0.2, 1.0))
    if kind == "GroupLasso" and rng.random() < 0.6:
        options["axis"] = rng.choice((0, 1, -1))
    if kind == "MaxNorm":
        options["limit"] = rng.choice((0.1, 0.4, 1.0))
    if kind == "SpectralPenalty" and rng.random() < 0.3:
        options["iterations"] = 2
    return options


def _parameters(kind: str, known: Known, rng: random.Random) -> tuple[str, ...] | None:
    tables = kind == "EmbeddingDropout"
    places = [p for p in known.parameters if p.dims >= 2 and (not tables or any(n.op == "Embedding" for n in p.names))]
    if not places:
        return None
    if tables and known.tokens and rng.random() < 0.3:
        return ("*",)
    if not tables and rng.random() < 0.25:
        return ("*",)
    texts = patterns(known, places, rng, False)
    tied = [p for p in places if len(p.names) > 1]
    if kind in ON_READS and tied and rng.random() < 0.5:
        texts = (rng.choice(tied[0].names).name,)
    elif rng.random() < 0.25:
        texts = (f"**{rng.choice(rng.choice(places).names).name}",)
    return ("**",) if tables and "*" in texts else texts


def _fits(kind: str, known: Known, place: Place) -> bool:
    dims = known.dims.get(place.name, 2)
    if kind == "KLSparsity":
        return dims >= 2 and any(name.op in SQUASHED for name in place.names)
    if kind == "ChannelDropout":
        return dims >= 3
    if kind == "NEFTune":
        return dims == 3
    if kind == "LayerDrop":
        modules = [name.module for name in place.names if name.module is not None and name.default]
        recurrent = place.names[0].op.startswith(("RNN", "GRU", "LSTM", "Emb"))
        return bool(modules) and known.called.get(modules[0] or "", 0) == 1 and not recurrent
    return dims >= 2 or kind not in ON_UNITS


def _values(kind: str, known: Known, rng: random.Random) -> tuple[str, ...] | None:
    """A selector. Where the default sites are not told here, a name."""
    own = kind in (*LATER_SPLICES, "NEFTune")
    places = [replace(p, usable=p.usable and (p.used or not own) and _fits(kind, known, p)) for p in known.values]
    if not any(p.usable for p in places):
        return ("*",) if kind == "NEFTune" and known.tokens else None
    if kind == "LayerDrop":
        return (rng.choice([p for p in places if p.usable]).names[0].text,)
    if kind == "NEFTune" and known.tokens and rng.random() < 0.4:
        return ("*",)
    texts = patterns(known, places, rng, known.roles_sure)
    channels = [p for p in places if p.usable and known.convolved.get(p.name)] if kind in ON_UNITS else []
    if channels and rng.random() < 0.6:
        return (rng.choice(channels).name,)
    if kind in UNTOLD and not _told(texts):
        return (rng.choice([p for p in places if p.usable]).name,)
    return texts


def _told(texts: Sequence[str]) -> bool:
    """Whether none of the sites is there by default."""
    return "*" not in texts and not all(text.startswith("!") for text in texts)


def _of_units(reg: Reg, known: Known, rng: random.Random) -> Reg:
    """With the axis of units where it is not told here, and sometimes elsewhere."""
    options = dict(reg.options)
    sites = found(reg, known).sites
    if any(known.convolved.get(site) is None for site in sites) or rng.random() < 0.15:
        options["axis"] = rng.choice((-1, 1, 0))
    if reg.kind == "KLSparsity" and rng.random() < 0.4:
        options["target"] = rng.choice((0.2, 0.5))
    if reg.kind == "VarianceFloor" and rng.random() < 0.5:
        options["gamma"] = rng.choice((0.3, 2.0))
    return replace(reg, options=options)


def _shared(reg: Reg, known: Known, rng: random.Random) -> Reg:
    """With ``share_axes=``: by number, or by name where the axis of time is told here."""
    sites = found(reg, known).sites
    dims = min((known.dims.get(site, 0) for site in sites), default=0)
    if dims < 1:
        return reg
    axis_of_time = {site: 1 for site in sites if site not in known.recurrent} | known.near | known.axes
    told = all(known.dims.get(site, 0) >= 3 and axis_of_time.get(site) is not None for site in sites)
    axes: Any = rng.randrange(-dims, dims)
    if told and rng.random() < 0.7:
        axes = rng.choice(("time", "batch", ["time", "batch"]))
    elif dims > 1 and rng.random() < 0.3:
        axes = rng.sample(range(dims), 2)
    return replace(reg, options={**reg.options, "share_axes": axes})
