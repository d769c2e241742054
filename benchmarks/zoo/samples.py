"""A model of each library, used in every way that graphreg offers: ``python -m zoo.samples`` writes docs/models_ways.md.

All ways are compared with one step of the module that ``regularize`` returns: outputs, penalties and gradients. In eager they must be
equal bit for bit; a stage adds up its penalties itself, and Inductor computes in another order, so these may differ by rounding.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphreg
from zoo.providers import Inputs, call, one_line, provider, tensors
from zoo.subject import Failed, loss_of
from zoo.ways import WEIGHTS

# Inductor draws the masks of native dropout in a way of its own, so graphreg draws them here
ASKED: Mapping[str, Any] = {**WEIGHTS, "own_dropout": "seeded", "missing": "ignore"}
ROUNDING = 1e-4  # of the largest element
MODELS = (
    "vit_pytorch/simple_vit", "x_transformers/decoder", "monai/UNet", "rtdl/FTTransformer", "pyg/GCN", "smp/Unet",
    "pytorchcv/shufflenet", "diffusers/UNet2DModel", "speechbrain/Xvector", "stable_baselines3/q_net", "open_clip/CLIP",
)  # fmt: skip
HEAD = """# Models of other libraries, in every way

`python -m zoo.samples`, in the environment of `make zoo-libraries`, takes a small model of each [library](models_other.md), and uses it in
every way. A step of training with `hidden_dropout`, `hidden_l1`, `weight_l2` and `own_dropout="seeded"` is compared with the step of the
module that `regularize` returns, from the same seed: all outputs, penalties and gradients.

| column | what is compared |
|---|---|
| in place | `regularize_`: bit for bit |
| blocks | `blocks=` with the layers of the first list of equal layers: bit for bit; "n/a": there is no such list |
| pickled | the module after `pickle.dumps` and `pickle.loads`: bit for bit |
| stage | the whole model as the only stage of a pipeline, by `regularize_stage`: outputs bit for bit, gradients within rounding |
| verify | `graphreg.verify` finds no difference from the model |
| stripped | what `strip` returns gives the model's outputs in eval mode: bit for bit |
| Inductor | `torch.compile(module, fullgraph=True)`, within rounding |
"""


@dataclass(frozen=True)
class Step:
    """What a step of training gave."""

    outputs: list[Tensor]
    penalties: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    def require_same(self, other: Step, near: float = 0.0) -> None:
        """Raise Failed if ``other`` differs by more than ``near`` of the largest element."""
        for what, ours, theirs in (
            ("output", dict(enumerate(self.outputs)), dict(enumerate(other.outputs))),
            ("penalty", self.penalties, other.penalties), ("gradient", self.gradients, other.gradients),
        ):  # fmt: skip
            if ours.keys() != theirs.keys():
                raise Failed(f"other {what}s: {sorted(map(str, ours.keys() ^ theirs.keys()))[:3]}")
            largest = max((float(value.abs().max()) for value in ours.values() if value.numel()), default=0.0)
            for name, value in ours.items():
                apart = float((value.double() - theirs[name].double()).abs().max()) if value.numel() else 0.0
                if not apart <= near * largest:
                    raise Failed(f"{what} {name} differs by {apart:.1e}, where the largest is {largest:.1e}")


class Sample:
    """A model, and the ways in which it is used. Each way gets a copy, so that each makes its first call."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model.train(), inputs

    def regularized(self, **options: Any) -> Any:
        return graphreg.regularize(copy.deepcopy(self.model), example_inputs=self.inputs, rng=0, **ASKED, **options)

    def step(self, module: nn.Module, forward: Callable[[Inputs], Any] | None = None, attached: bool = False) -> Step:
        """A step from the first seed. ``attached``: the module adds the gradients of its penalties itself."""
        torch.manual_seed(3)
        found = call(module if forward is None else forward, self.inputs)
        output, penalties = (found, {}) if attached else found
        loss_of(output, penalties).backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return Step(
            [tensor.detach() for tensor in tensors(output) if tensor.is_floating_point()],
            {name: value.detach() for name, value in (module.penalties() if attached else penalties).items()}, gradients,
        )  # fmt: skip

    @cached_property
    def expected(self) -> Step:
        return self.step(self.regularized())


def in_place(sample: Sample) -> str:
    model = graphreg.regularize_(copy.deepcopy(sample.model), penalties="return", rng=0, **ASKED)
    sample.expected.require_same(sample.step(model))
    return "yes"


def blocks(sample: Sample) -> str:
    lists = [
        path for path, module in sample.model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and len({type(each) for each in module}) == 1
        and module[0] is not None and next(module[0].children(), None) is not None
    ]  # fmt: skip
    for path in lists:
        try:
            module = sample.regularized(blocks=f"{path}.*")
        except graphreg.GraphRegError:  # lists in lists: its layers are not called themselves
            continue
        sample.expected.require_same(sample.step(module))
        return f"`{path}.*`"
    return "n/a"


def pickled(sample: Sample) -> str:
    sample.expected.require_same(sample.step(pickle.loads(pickle.dumps(sample.regularized()))))
    return "yes"


def stage(sample: Sample) -> str:
    model = copy.deepcopy(sample.model)
    whole = graphreg.trace(model, sample.inputs)
    only = graphreg.regularize_stage(model, whole=whole, microbatches=1, example_inputs=sample.inputs, rng=0, scale=1, **ASKED)
    ours = sample.step(only, attached=True)
    Step(sample.expected.outputs, {}, {}).require_same(Step(ours.outputs, {}, {}))
    sample.expected.require_same(ours, ROUNDING)
    return "yes"


def verified(sample: Sample) -> str:
    positional, named = ((), sample.inputs) if isinstance(sample.inputs, dict) else (sample.inputs, {})
    model = copy.deepcopy(sample.model)
    graphreg.verify(model, graphreg.regularize(model, example_inputs=sample.inputs, rng=0, **ASKED), *positional, **named)
    return "yes"


def stripped(sample: Sample) -> str:
    model = copy.deepcopy(sample.model).eval()
    plain = graphreg.strip(graphreg.regularize(model, example_inputs=sample.inputs, rng=0, **ASKED)).eval()
    with torch.no_grad():
        Step(tensors(call(model, sample.inputs)), {}, {}).require_same(Step(tensors(call(plain, sample.inputs)), {}, {}))
    return "yes"


def compiled(sample: Sample) -> str:
    torch.compiler.reset()
    module = sample.regularized()
    sample.expected.require_same(sample.step(module, torch.compile(module, fullgraph=True)), ROUNDING)
    return "yes"


WAYS: Mapping[str, Callable[[Sample], str]] = {
    "in place": in_place, "blocks": blocks, "pickled": pickled, "stage": stage, "verify": verified, "stripped": stripped,
    "Inductor": compiled,
}  # fmt: skip


def answers(name: str, sample: Sample) -> list[str]:
    """The cells of a model's row: the answer of each way, or why it failed."""
    cells = list[str]()
    for title, way in WAYS.items():
        print(f"{name}: {title}", file=sys.stderr, flush=True)
        try:
            cells.append(way(sample))
        except Exception as error:  # one way's failure must not hide the others'
            cells.append(f"**no**: {str(error) if isinstance(error, Failed) else one_line(error)}")
    return cells


def row(name: str) -> list[str]:
    """The row of a model: its name, and its answers or why it is not built here."""
    source, _, own = name.partition("/")
    try:
        sample = Sample(*provider("zoo.libraries.models", source).build(own))
    except Exception as error:  # the library does not run here
        return [f"`{name}`", f"not built: {one_line(error)}", *[""] * (len(WAYS) - 1)]
    return [f"`{name}`", *answers(name, sample)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=MODELS, help="names of models, such as pyg/GCN")
    parser.add_argument("--page", type=Path, default=Path("docs/models_ways.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what models say of themselves
    rows = [["model", *WAYS], ["---"] * (len(WAYS) + 1), *map(row, options.only)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    options.page.write_text(f"{HEAD}\ntorch {version('torch')}, on a CPU.\n\n{table}\n")


if __name__ == "__main__":
    main()
