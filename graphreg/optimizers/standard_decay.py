"""The usual rule for weight decay: matrices are decayed; norms, biases and embeddings are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Literal

from torch import nn

from graphreg.errors import RegularizerError
from graphreg.ir.operations import is_normalization, is_scale
from graphreg.ir.site import Site
from graphreg.optimizers.parameters import ModelParameters

Reason = Literal["fewer than 2 dims", "bias", "norm", "embedding", "the model's own list"]
# parts of the names of parameters that are tables and tokens, and not matrices: pos_embed, class_token, relative_position
_TABLES = ("embed", "token", "position")


def undecayed(parameters: ModelParameters) -> dict[Site, Reason]:
    """Return the parameters that the usual rule leaves without decay, each with the reason. A tied one is if any of its names is.

    Raises:
        RegularizerError: A parameter of a lazy module has no shape yet.
    """
    listed = _models_own(parameters.modules)
    found: dict[Site, Reason] = {}
    for site, parameter in parameters.of_site.items():
        if nn.parameter.is_lazy(parameter):
            raise RegularizerError(
                f"{site.name} has no shape yet, on which the standard rule for weight decay depends. Run the model once, so that its lazy "
                "modules get their shapes, and call param_groups then; or leave decay='standard' out."
            )
        # Such a mark is mamba_ssm's, and that of models made after it.
        if site.name in listed or getattr(parameter, "_no_weight_decay", False):
            found[site] = "the model's own list"
        elif reasons := [why for label in site.labels if (why := _reason(parameters.modules, label.name, parameter)) is not None]:
            found[site] = reasons[0]
    return found


def _reason(modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter) -> Reason | None:
    path, _, own = name.rpartition(".")
    module = modules[path]
    if parameter.dim() < 2:
        return "fewer than 2 dims"
    if "bias" in own:
        return "bias"
    if is_normalization(module):
        return "norm"
    is_table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or any(part in own for part in _TABLES)
    if is_table or ("embedding" in type(module).__name__.lower() and not any(module.children())):
        return "embedding"
    # A scale or a query that is shaped for broadcasting, [1, 1, n]: a vector. A layer's weight may be of one row.
    if ("weight" not in own and sum(size > 1 for size in parameter.shape) < 2) or is_scale(module, own):
        return "fewer than 2 dims"
    return None


def _models_own(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names that methods ``no_weight_decay`` of timm's models and others list, relative to the module, as names or globs."""
    parameters = {id(m): [n for n, _ in m.named_parameters(remove_duplicate=False)] for m in modules.values() if _lists(m)}
    found = set[str]()
    for path, module in modules.items():
        for glob in module.no_weight_decay() if _lists(module) else ():  # type: ignore[operator]
            found.update(f"{path}.{name}" if path else name for name in fnmatch.filter(parameters[id(module)], str(glob)))
    return found


def _lists(module: nn.Module) -> bool:
    return callable(getattr(type(module), "no_weight_decay", None))
