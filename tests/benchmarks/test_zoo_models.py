"""The zoo's models: where they come from, how they are made small, and that each column sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from tiny_zoo import Branching, Perceptron
from zoo import columns, vision
from zoo.control import CONTROL
from zoo.models import INDUCTOR, PROVIDERS
from zoo.providers import Inputs, call, in_turn, tensors, try_out
from zoo.recurrent import RECURRENT, TRANSFORMERS, Entry
from zoo.subject import Failed, Subject
from zoo.tiny import SHALLOW, SMALL, sizes, tiny

X: Inputs = (torch.linspace(-1, 1, 8).reshape(2, 4),)


def test_all_of_torchvision_is_there() -> None:
    providers = (vision.CLASSIFICATION, vision.QUANTIZABLE, vision.SEGMENTATION, vision.VIDEO, vision.FLOW, vision.DETECTION)
    names = [name for provider in providers for name in provider.names()]
    assert sorted(names) == sorted(tv.list_models())


def test_architectures_come_in_turn() -> None:
    families = {"a": ["a1", "a2", "a3"], "b": ["b1"], "c": ["c1", "c2"]}
    assert in_turn(families, 5) == {"a1": "a", "b1": "b", "c1": "c", "a2": "a", "c2": "c"}
    assert list(in_turn(families, 9)) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_the_sample_for_inductor_names_providers() -> None:
    assert {name.partition("/")[0] for name in INDUCTOR} <= PROVIDERS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.nn")  # of nested tensors, that they are not used
@pytest.mark.parametrize("entries", [TRANSFORMERS, RECURRENT, CONTROL], ids=["transformer", "recurrent", "control"])
def test_the_zoos_own_models_run_in_both_modes(entries: dict[str, Entry]) -> None:
    for make, inputs, kind in entries.values():
        torch.manual_seed(0)
        model = make()
        try_out(model, inputs)
        assert kind and any(t.requires_grad for t in tensors(call(model, inputs)))


@dataclass
class Picture:
    sub_configs = {}
    hidden_size: int = 512
    image_size: int = 224
    depths: list[int] = field(default_factory=lambda: [3, 27, 1])


@dataclass
class Text:
    sub_configs = {"vision_config": Picture}
    vocab_size: int = 50_000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    head_dim: int | None = None
    layer_types: list[str] = field(default_factory=lambda: ["sliding", "sliding", "full", "sliding"])
    eos_token_id: int = 50_256
    dropout: float = 0.1
    tie_weights: bool = True
    vision_config: Picture | None = field(default_factory=Picture)


def test_a_tiny_configuration() -> None:
    small = Picture(hidden_size=32, image_size=64, depths=[2, 2, 1])
    assert tiny(Text, SMALL) == Text(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_types=["sliding", "full"], eos_token_id=56,
        vision_config=small,
    )  # fmt: skip
    shallow = tiny(Text, SHALLOW)
    assert (shallow.hidden_size, shallow.num_attention_heads, shallow.vocab_size, shallow.vision_config.hidden_size) == (4096, 32, 120, 512)
    found = sizes(tiny(Text, SMALL))
    assert (found["hidden_size"], found["image_size"]) == (32, 64)  # the outermost counts, and what only an inner one has is seen


def test_a_cache_is_no_output() -> None:
    class SomeCache:
        keys = torch.ones(1)

    output = {"a": torch.zeros(1), "cache": SomeCache(), "b": [torch.ones(2), None], "c": SimpleNamespace(d=torch.ones(3))}
    assert [t.shape[0] for t in tensors(output)] == [1, 2, 3]


def subject(model: nn.Module) -> Subject:
    torch.manual_seed(0)
    return Subject(model, X)


def test_a_model_that_comes_out_right_passes_every_column() -> None:
    found = columns.examine(subject(Perceptron()))
    assert all(cell["passed"] for cell in found["columns"].values()), found  # type: ignore[attr-defined]
    figures: Any = found["figures"]
    assert (figures["front end"], figures["graphs"], figures["examples"], figures["parameters"]) == ("symbolic", 1, False, 58)


def wrong(change: Callable[[Any], Any]) -> Subject:
    """A subject whose module gives what ``change`` makes of its output."""
    found = subject(Perceptron())
    way: Any = found.way

    class Wrong(type(way)):  # type: ignore[misc]
        def __call__(self, inputs: Inputs) -> Any:
            output, penalties = super().__call__(inputs)
            return change(output), penalties

    way.__class__ = Wrong
    return found


def slightly(output: Tensor) -> Tensor:
    return output + 2e-7


def apart(output: Tensor) -> Tensor:
    return output.detach() + torch.zeros(1, requires_grad=True)


@pytest.mark.parametrize(
    ("column", "change", "reason"),
    [
        (columns.zero, slightly, "train mode, zero strengths: 1 of 1 outputs differ, by 2.*e-07 at most"),
        (columns.evaluation, slightly, "eval mode: 1 of 1 outputs differ, by 2.*e-07 at most"),
        (columns.evaluation, lambda output: [output], "eval mode: list is returned, not Tensor"),
        (columns.evaluation, lambda output: output[:1], "eval mode: 1 outputs are returned where the model has 1, or of other shapes"),
        (columns.gradients, lambda output: output * 1.01, "a gradient differs by .*, where the largest is"),
        (
            columns.gradients,
            lambda output: output.detach() + torch.zeros(1, requires_grad=True),
            "4 parameters lost their gradient: hid.weight",
        ),
        (columns.step, lambda output: output * float("inf"), "the loss is inf"),
    ],
)
def test_a_column_sees_what_is_wrong(column: Callable[[Subject], object], change: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        column(wrong(change))


def test_what_is_near_is_told_apart_from_what_is_equal() -> None:
    one, near = torch.ones(2), torch.ones(2) + 2e-7
    assert columns.same(one, one.clone(), "", exact=False).text == "yes"
    assert columns.same(one, near, "", exact=False).text == "1e-06"
    with pytest.raises(Failed, match="1 of 1 outputs differ, by 1.0e-05"):
        columns.same(torch.zeros(2), torch.full((2,), 1e-5), "", exact=False)
    with pytest.raises(Failed, match="differ, by nan"):
        columns.same(one, one * float("nan"), "", exact=False)


def test_keys_sees_a_model_that_was_changed() -> None:
    found = subject(Perceptron())
    assert columns.keys(found).text == "yes"
    found.after = dict(found.after) | {"config": {"use_cache": False}}
    with pytest.raises(Failed, match="the model's config changed"):
        columns.keys(found)


def test_a_model_that_torch_itself_does_not_compile_is_not_asked() -> None:
    class Printing(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    assert columns.refusal(Perceptron(), subject(Perceptron())) == ""
    model = Printing()
    assert columns.refusal(model, subject(model)).startswith("Unsupported: Call to `torch._dynamo.graph_break()`")


def test_what_no_front_end_takes_goes_through_the_backend() -> None:
    found = columns.examine(subject(Branching()))
    cells = {name: cell["cell"] for name, cell in found["columns"].items()}  # type: ignore[attr-defined]
    assert cells | {"names": "n/a", "stripped": "n/a", "compiled": "2 graphs"} == cells, found
    assert all(cells[name] == "yes" for name in ("step", "gradients", "eval", "zero", "keys", "modes"))
