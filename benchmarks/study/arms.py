"""The protocol, part 1: the arms. An arm is a network with the regularizers that act in it, and how their strength is chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import graphreg

SEEDS = tuple(range(10))  # of the results
TUNING = (100, 101, 102)  # of the choice of a strength
ALLOWED = 1.0  # points of validation score that the rule "strongest" may give up


@dataclass(frozen=True)
class Varied:
    """Stands in keywords where the strength of the grid goes."""

    by_depth: bool = False

    def filled(self, strength: float) -> Any:
        return graphreg.by_depth(0, strength) if self.by_depth else strength

    def __repr__(self) -> str:
        return "by_depth(0, s)" if self.by_depth else "s"


S, DEPTH = Varied(), Varied(by_depth=True)


@dataclass(frozen=True)
class Arm:
    """Keywords for ``graphreg.regularize`` in a network. No keywords: the control."""

    name: str
    setup: str
    keywords: Mapping[str, Any]
    grid: tuple[float, ...] = ()  # from weak to strong
    rule: str = ""  # "best" or "strongest"
    base: str = ""  # the arm whose keywords, with the strength that was chosen there, come first

    @property
    def text(self) -> str:
        own = ", ".join(f"{key}={value!r}" for key, value in self.keywords.items())
        return f"{own}, beside {self.base} as chosen" if self.base else own or "nothing"

    def filled(self, strength: float | None) -> dict[str, Any]:
        return {key: _filled(value, strength) for key, value in self.keywords.items()}

    @property
    def digest(self) -> str:
        """Of all that decides what the arm's runs do, but the code of the network."""
        asked = (self.setup, self.text, self.grid, self.rule, SEEDS, TUNING, ALLOWED)
        base = ARMS[self.base].digest if self.base else ""
        return hashlib.sha256(repr((asked, base)).encode()).hexdigest()[:12]


def _filled(value: Any, strength: float | None) -> Any:
    if isinstance(value, Varied):
        assert strength is not None
        return value.filled(strength)
    return {key: _filled(inner, strength) for key, inner in value.items()} if isinstance(value, dict) else value


def plain(setup: str) -> str:
    """The name of a network's control."""
    return f"{setup}: nothing"


RATES = (0.1, 0.3, 0.5, 0.7)
COLUMN_DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MAP_RATES = (0.1, 0.2, 0.3, 0.5)
SUM_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


def _summed(**options: Any) -> dict[str, Any]:
    return {"weight": S, "reduction": "sum"} | options


def _at(pattern: Any, **options: Any) -> dict[str, Any]:
    return {"weight": S, "pattern": pattern} | options


_ALL = (
    *(Arm(plain(setup), setup, {}) for setup in (
        "few", "maps", "deep", "resnet", "wide", "selu", "chain", "cells", "lstm", "autoencoder", "views", "transfer", "regression",
        "columns")),
    Arm("few: dropout", "few", {"hidden_dropout": S}, RATES, "best"),
    Arm("few: weight decay", "few", {"weight_l2": _summed()}, (1e-4, 3e-4, 1e-3, 3e-3), "best"),
    Arm("few: Gaussian dropout", "few", {"gaussian_dropout": S}, RATES, "best"),
    Arm("few: input noise", "few", {"input_noise": S}, (0.1, 0.2, 0.4, 0.8), "best"),
    Arm("few: max-norm", "few", {"max_norm": {"weight": 1.0, "limit": S, "pattern": ["0.weight", "2.weight"]}}, (3.0, 2.0, 1.0), "best",
        "few: dropout"),
    Arm("few: DropConnect", "few", {"drop_connect": S}, RATES, "best"),
    Arm("few: concrete dropout", "few", {"concrete_dropout": _summed()}, (5e-4, 1.5e-3, 5e-3), "best"),
    Arm("few: L0 gates", "few", {"l0_gates": _summed()}, (1e-4, 3e-4, 1e-3, 3e-3), "strongest"),
    Arm("few: hidden L1", "few", {"hidden_l1": S}, (0.03, 0.1, 0.3, 1.0, 3.0), "strongest"),
    Arm("few: Hoyer-Square", "few", {"hoyer_square": S}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "strongest"),
    Arm("few: DeCov", "few", {"decov": S}, (1e-3, 1e-2, 1e-1, 1.0), "best"),
    Arm("few: confidence", "few", {"confidence": S}, (0.1, 0.3, 1.0, 2.0), "best"),
    Arm("few: z-loss", "few", {"z_loss": S}, SUM_DECAYS, "strongest"),
    Arm("few: spectral", "few", {"spectral": _summed()}, (1e-3, 5e-3, 2e-2, 1e-1), "best"),
    Arm("maps: dropout", "maps", {"dropout": _at(["2", "4"])}, MAP_RATES, "best"),
    Arm("maps: channel dropout", "maps", {"channel_dropout": _at(["2", "4"])}, MAP_RATES, "best"),
    Arm("maps: DropBlock", "maps", {"drop_block": _at(["2", "4"], block_size=3)}, MAP_RATES, "best"),
    Arm("deep: drop path", "deep", {"drop_path": DEPTH}, (0.1, 0.2, 0.3, 0.5), "best"),
    Arm("deep: LayerDrop", "deep", {"layer_drop": _at("blocks.*")}, (0.1, 0.2, 0.3, 0.5), "strongest"),
    Arm("resnet: dropout, all hidden", "resnet", {"hidden_dropout": S}, RATES, "best"),
    Arm("resnet: dropout, unmarked", "resnet", {"dropout": _at(["!#normed", "!#trunk"])}, RATES, "best"),
    Arm("wide: dropout, all hidden", "wide", {"hidden_dropout": S}, RATES, "best"),
    Arm("wide: dropout, unmarked", "wide", {"dropout": _at(["!#normed", "!#trunk"])}, RATES, "best"),
    Arm("wide: dropout, classifier", "wide", {"dropout": _at("pool")}, RATES, "best"),
    Arm("deep: dropout, all hidden", "deep", {"hidden_dropout": S}, RATES, "best"),
    Arm("deep: dropout, classifier", "deep", {"dropout": _at("norm")}, RATES, "best"),
    Arm("selu: alpha dropout", "selu", {"alpha_dropout": S}, (0.05, 0.1, 0.2), "best"),
    Arm("selu: dropout", "selu", {"hidden_dropout": S}, (0.05, 0.1, 0.2), "best"),
    Arm("chain: orthogonality", "chain", {"orthogonality": _summed()}, SUM_DECAYS, "best"),
    Arm("cells: zoneout", "cells", {"zoneout": S}, (0.05, 0.15, 0.3, 0.5), "best"),
    Arm("lstm: locked dropout", "lstm", {"locked_dropout": _at(["first", "second"])}, MAP_RATES, "best"),
    Arm("lstm: dropout", "lstm", {"dropout": _at(["first", "second"])}, MAP_RATES, "best"),
    Arm("lstm: weight drop", "lstm", {"weight_dropout": _at("*.weight_hh_*")}, RATES, "best"),
    Arm("autoencoder: KL sparsity", "autoencoder", {"kl_sparsity": _at("sigmoid")}, (0.03, 0.1, 0.3, 1.0), "strongest"),
    Arm("autoencoder: contractive", "autoencoder", {"contractive": _at("sigmoid")}, (0.01, 0.03, 0.1, 0.3, 1.0), "best"),
    Arm("autoencoder: weight decay", "autoencoder", {"weight_l2": _summed()}, SUM_DECAYS, "best"),
    Arm("views: variance floor", "views", {"variance_floor": _at("2")}, (0.1, 0.3, 1.0, 3.0), "best"),
    Arm("views: covariance", "views", {"covariance": _at("2")}, (0.01, 0.04, 0.2, 1.0), "best", "views: variance floor"),
    Arm("transfer: L2-SP", "transfer", {"l2_sp": _summed(pattern="body.*")}, (*SUM_DECAYS, 1.0), "best"),
    Arm("transfer: weight decay", "transfer", {"weight_l2": _summed(pattern="body.*")}, (*SUM_DECAYS, 1.0), "best"),
    Arm("regression: weight decay", "regression", {"weight_l2": _summed()}, (0.01, 0.03, 0.1, 0.3), "best"),
    Arm("regression: L1", "regression", {"weight_l1": _summed()}, (0.01, 0.03, 0.1, 0.3), "best"),
    Arm("regression: elastic net", "regression", {"elastic_net": _summed()}, (0.01, 0.03, 0.1, 0.3), "best"),
    Arm("columns: group lasso", "columns", {"group_lasso": _summed(pattern="0.weight", axis=1)}, COLUMN_DECAYS, "strongest"),
    Arm("columns: L1", "columns", {"weight_l1": _summed(pattern="0.weight")}, COLUMN_DECAYS, "strongest"),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ALL}
PLACES = {  # the arms that tell places of dropout apart: at how many values of the network it acts, and at which
    "resnet: dropout, all hidden": (17, "all hidden values"),
    "resnet: dropout, unmarked": (1, "values without a mark: the classifier's input"),
    "wide: dropout, all hidden": (17, "all hidden values"),
    "wide: dropout, unmarked": (9, "values without a mark: the input of the second convolution of each branch, and the classifier's input"),
    "wide: dropout, classifier": (1, "the classifier's input"),
    "deep: dropout, all hidden": (33, "all hidden values, none of which has a mark"),
    "deep: dropout, classifier": (1, "the classifier's input"),
}
