"""Which parameters ``graphreg.param_groups(decay="standard")`` decays, beside timm's and transformers' own helpers.

``python benchmarks/decays.py`` prints the tables of docs/optimizers.md, for 24 models on the meta device. ``--zoo`` checks all models of
``make zoo`` instead: that each trainable parameter is in exactly one group, and counts what differs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import transformers
from page import row
from timm.optim import param_groups_weight_decay
from torch import nn
from transformers import Trainer

import graphreg
from graphreg.optimizers.parameters import ModelParameters
from graphreg.optimizers.standard_decay import undecayed
from zoo.providers import provider

OF_TIMM = (
    "resnet50", "efficientnet_b0", "convnext_tiny", "convnextv2_tiny", "vit_tiny_patch16_224", "deit3_small_patch16_224",
    "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mixer_s16_224", "xcit_nano_12_p16_224",
    "cait_xxs24_224",
)  # fmt: skip
OF_TRANSFORMERS = ("bert", "gpt2", "llama", "t5", "vit", "swin", "mixtral", "mamba", "mamba2", "wav2vec2", "clip", "falcon_h1")


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def models() -> Iterator[tuple[str, nn.Module]]:
    for name in OF_TIMM:
        yield f"timm {name}", on_meta(lambda name=name: timm.create_model(name))  # type: ignore[misc]
    for kind in OF_TRANSFORMERS:
        config = transformers.AutoConfig.for_model(kind)
        yield f"transformers {kind}", on_meta(lambda config=config: transformers.AutoModel.from_config(config))  # type: ignore[misc]


def decayed(groups: Any) -> set[int]:
    return {id(p) for group in groups if group["weight_decay"] for p in group["params"]}


def by_timm(model: nn.Module) -> set[int]:
    listed = getattr(model, "no_weight_decay", set)  # as timm's create_optimizer asks it
    return decayed(param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed()))


def by_transformers(model: nn.Module) -> set[int]:
    names = set(Trainer.get_decay_parameter_names(None, model))
    return {id(p) for name, p in model.named_parameters() if name in names and p.requires_grad}


HELPERS = {"timm": by_timm, "transformers": by_transformers}


def compared(model: nn.Module) -> tuple[int, int, dict[str, list[tuple[str, str]]]]:
    """The numbers of trained and of decayed parameters; by helper, the names on which it differs, each with the reason."""
    groups = graphreg.param_groups(model, default={"weight_decay": 0.1}, decay="standard")
    ours, found = decayed(groups), ModelParameters.of(model)
    inside = Counter(id(p) for group in groups for p in group["params"])
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert inside == Counter(trained.keys()), "a parameter is in no group, or in two"
    reasons = {id(found.of_site[site]): reason for site, reason in undecayed(found).items()}
    differ = {}
    for helper, theirs in ((name, helper(model)) for name, helper in HELPERS.items()):
        more = [(name, f"decayed by {helper}: {reasons[each]}") for each, name in trained.items() if each in theirs - ours]
        less = [(name, f"not decayed by {helper}") for each, name in trained.items() if each in ours - theirs]
        differ[helper] = more + less
    return len(trained), len(ours), differ


def zoo() -> None:
    """Check every model of the zoo that can be built."""
    records = [json.loads(line) for line in (Path(__file__).parents[1] / "docs" / "models.jsonl").read_text().splitlines()]
    names = [record["name"] for record in records]
    totals = Counter[str]()
    for name in names:
        source, _, own = name.partition("/")
        # The first size is built, and not run to see whether the model takes it.
        with patch("zoo.providers.try_out"):
            try:
                with torch.device("meta"):
                    model, _ = provider("zoo.models", source).build(own)
            except NotImplementedError:  # RegNet's constructor computes with values
                model, _ = provider("zoo.models", source).build(own)
        trained, ours, differ = compared(model)
        totals.update(reason for found in differ.values() for _, reason in found)
        print(name, trained, ours, {helper: len(found) for helper, found in differ.items()}, flush=True)
    print(f"{len(names)} models: each trainable parameter is in one group")
    print(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", action="store_true")
    if parser.parse_args().zoo:
        zoo()
        return
    examples: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    print(row("model", "parameters", "decayed", "timm differs on", "transformers differs on"))
    print(row(*["---"] * 5))
    for title, model in models():
        trained, ours, differ = compared(model)
        print(row(title, trained, ours, *(len(found) for found in differ.values())))
        for found in differ.values():
            for name, reason in found:
                examples[reason][title].append(name)
    print()
    print(row("difference", "parameters", "for example"))
    print(row(*["---"] * 3))
    for reason, by_model in sorted(examples.items()):
        shown = [f"`{names[0]}` of {title}" for title, names in list(by_model.items())[:3]]
        print(row(reason, sum(map(len, by_model.values())), ", ".join(shown)))


if __name__ == "__main__":
    main()
