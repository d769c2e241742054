"""Names of a model's values compared with torchvision's, and with the modules that are called."""

from __future__ import annotations

from torch import nn
from torchvision.models.feature_extraction import get_graph_node_names

import graphreg
from graphreg.ir.operations import is_dropout_module
from zoo.providers import call
from zoo.subject import Subject


def listed(traced: graphreg.Traced) -> set[str]:
    found = {label.text for site in traced.values for label in site.labels}
    return found | {name.partition(":")[0] for name in found}


def unnamed(subject: Subject, traced: graphreg.Traced) -> set[str]:
    """The modules that are called and have no name; one that is shared goes by the first of its paths.

    What computes a parameter of a layer (``torch.nn.utils.parametrize``) runs within that layer, which is one operation.
    """
    paths = {path for path, _ in subject.model.named_modules() if path}
    unseen = {path for path in paths if ".parametrizations." in path or any(path.startswith(f"{leaf}.") for leaf in traced.opaque_modules)}
    return paths - listed(traced) - unseen - never_called(subject)


def never_called(subject: Subject) -> set[str]:
    """Containers and modules that the forward does not call have no value to name."""
    called: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda m, a, o: called.add(m)) for m in subject.model.modules()]
    for training in (True, False):
        subject.run(subject.model, lambda: call(subject.model, subject.inputs), training)
    for handle in handles:
        handle.remove()
    return {path for path, m in subject.model.named_modules() if m not in called}


def torchvision_names(model: nn.Module) -> list[str]:
    """Of both modes, each once."""
    train, evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    return list(dict.fromkeys(train + evaluation))


def names_missing(model: nn.Module, traced: graphreg.Traced, theirs: list[str]) -> list[str]:
    """Those of torchvision's that graphreg has not, save where it gives a value the name of a module: it strips "_N" from a leaf
    module's own name (its ln_1 is the output of ln_2) and calls torch.cat in FloatFunctional, which is never called itself, by the
    path of that, where here only a module has its path. That called modules have theirs is ``unnamed``'s to see. And save the insides
    of a dropout of the model's own, which is one operation here: timm's DropPath, as nn.Dropout is to both."""
    paths = {path for path, _ in model.named_modules() if path}
    whole = tuple(f"{path}." for path, module in model.named_modules() if is_dropout_module(module))
    shortened = {path.rpartition("_")[0] for path in paths if path.rpartition("_")[2].isdigit()}
    known = listed(traced)
    return [name for name in theirs if name not in known | shortened | paths and not name.startswith(whole)]
