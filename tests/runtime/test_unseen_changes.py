"""Changes of the model that a module does not follow are said at its next call: checkpointing of the libraries, flags, hooks."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")

import graphreg  # noqa: E402
from graphreg.errors import GraphRegError  # noqa: E402

OPTIONS: dict[str, Any] = {"weight_l2": 0.1, "rng": 0}


def vit() -> tuple[Any, Any]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    return model, torch.randn(2, 3, 32, 32)


def bert() -> tuple[Any, Any]:
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(**small)), {"input_ids": torch.randint(0, 50, (2, 5))}


def call(module: Any, x: Any) -> Any:
    return module(**x) if isinstance(x, dict) else module(x)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("made", "switch", "message"),
    [
        (vit, "set_grad_checkpointing", r"grad_checkpointing changed after .*grad_checkpointing=False\. Change it before .*regularize_"),
        (bert, "gradient_checkpointing_enable", r"gradient_checkpointing, encoder\.layer\.0\.gradient_checkpointing changed after"),
    ],
)
def test_checkpointing_of_the_libraries(made: Any, switch: str, message: str) -> None:
    """It is said once, where the call is, and not by a module that was made after."""
    model, x = made()
    module = graphreg.regularize(model, example_inputs=x, **OPTIONS)
    call(module, x)
    getattr(model, switch)()
    with pytest.warns(UserWarning, match=message) as said:
        call(module, x)
    assert said[0].filename == __file__
    call(module, x)
    call(copy.deepcopy(module), x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.doubles = nn.Linear(3, 3), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if self.doubles else y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.part = nn.ModuleList(Block() for _ in range(2)), nn.Sequential(Block())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.part(x)
        return y


X = torch.ones(1, 3)
HOOKED = r"part got a hook after graphreg.regularize.*Make such modules blocks that are called: .*blocks='part'\)"


@pytest.mark.parametrize("copied", [lambda module: module, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_hooks_and_flags(copied: Any) -> None:
    """Of modules that the graph opens; those of the modules that it calls act. A copy looks at its own modules."""
    module = copied(graphreg.regularize(Net(), blocks="blocks.*", **OPTIONS))
    ran: list[str] = []
    for path in ("part", "part.0.linear", "blocks.0"):
        module.get_submodule(path).register_forward_hook(lambda block, args, output, path=path: ran.append(path))
    with pytest.warns(UserWarning, match=HOOKED):
        module(X)
    module.part[0].doubles = True
    with pytest.warns(UserWarning, match=r"part\.0\.doubles changed after .*with doubles=False"):
        module(X)
    module.train().eval()
    module(X)
    assert ran == 3 * ["blocks.0", "part.0.linear"]


def test_compiled() -> None:
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(module := graphreg.regularize(model, **OPTIONS), backend="eager", fullgraph=True)
    compiled(X)
    model.part.register_forward_pre_hook(lambda block, args: None)
    with pytest.warns(UserWarning, match=HOOKED):
        compiled(X)
    compiled(X)
    assert module.graphreg_rules.unseen is not None
    torch._dynamo.reset()


def test_in_place_they_are_followed_or_refused() -> None:
    model = graphreg.regularize_(Net(), penalties="attach", scale=1, **OPTIONS)
    before = model(X)
    model.part[0].doubles = True
    assert torch.equal(model(X), 2 * before)
    model.part.register_forward_hook(lambda block, args, output: None)
    with pytest.raises(GraphRegError, match="part has a hook"):
        model(X)


def test_nothing_is_said_of_what_transformers_installs() -> None:
    model, x = bert()
    module = graphreg.regularize(model, example_inputs=x, **OPTIONS)
    model.eval()(**x, output_hidden_states=True)  # this installs hooks, which collect nothing in other calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(**x)
