"""Checks a solution of a task of the trials: ``python docs/trials/check.py 7 solution.py``, or ``all DIR`` with DIR/01.py to DIR/19.py.

It runs the solution's ``solve`` and compares what it returns with what is worked out here, by torch alone and by hand. A line says
``7 right`` or ``7 wrong: what was expected, what came``; the exit status is the number of tasks that are not right.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Solve = Callable[..., Any]
CHECKS: dict[int, Callable[[Solve], None]] = {}


class Net(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.norm, self.act1 = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Sigmoid()
        self.second, self.act2 = nn.Linear(32, 32), nn.Sigmoid()
        self.head = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.norm(self.first(x)))
        output: Tensor = self.head(self.act2(self.second(h)))
        return output


# What checks have in common


class Wrong(Exception):
    """A result that is not the expected one."""


def wrong(expected: object, came: object) -> NoReturn:
    """Say what was expected and what came, on one line."""
    expected, came = (each if isinstance(each, str) else short(each) for each in (expected, came))
    raise Wrong(f"expected {expected}, came {came}")


def short(value: object) -> str:
    """Return the repr of a value; of a module or of a tensor with many elements, no more than what it is."""
    if isinstance(value, nn.Module):
        return f"the module {type(value).__name__}"
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor {list(value.shape)}"
    line = " ".join(repr(value).split())
    return line if len(line) <= 200 else f"{line[:200]} …"


def same(what: str, came: object, expected: Tensor | float, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Compare a tensor or a number with the expected one."""
    right = torch.as_tensor(expected).detach().to(torch.float64)
    if not isinstance(came, Tensor | float | int):
        wrong(f"{what} {f'{right:.6g}' if right.dim() == 0 else f'a tensor {list(right.shape)}'}", came)
    given = torch.as_tensor(came).detach().to(torch.float64)
    if given.shape != right.shape:
        wrong(f"{what} a tensor {list(right.shape)}", f"one of shape {list(given.shape)}")
    far = (given - right).abs() > atol + rtol * right.abs()
    if far.any() or given.isnan().any():
        place = int(far.flatten().nonzero()[0]) if far.any() else 0
        at = f" at element {place} of {far.numel()}, {int(far.sum())} of which differ" if far.numel() > 1 else ""
        wrong(f"{what} {right.flatten()[place]:.6g}{at}", f"{given.flatten()[place]:.6g}")


def equal(what: str, came: object, expected: object) -> None:
    """Compare names, lists, numbers that must be the same."""
    if came != expected:
        wrong(f"{what} {short(expected)}", came)


def output_of(result: Any) -> Tensor:
    """Return the output of a call, alone or first in a tuple with penalties."""
    output = result[0] if isinstance(result, tuple) else result
    if not isinstance(output, Tensor):
        wrong("a tensor as output", output)
    return output


def module_of(result: object) -> Callable[..., Any]:
    if not callable(result):
        wrong("something to call", result)
    return result


def transparent(outputs: int = 32) -> Net:
    """Return a Net whose output is what its head reads, and whose running statistics stay as they are."""
    net = Net(outputs)
    net.norm.momentum = 0.0
    with torch.no_grad():
        net.head.weight.copy_(torch.eye(outputs, 32))
        net.head.bias.zero_()
    return net


def plain_in(model: nn.Module, x: Tensor, train: bool = True) -> Tensor:
    """Return the output of the model without regularizers, and leave its batch norm as it is."""
    with torch.no_grad():
        return torch.as_tensor(copy.deepcopy(model).train(train)(x))


def rate_of(output: Tensor, plain: Tensor) -> float:
    """Return the rate of the dropout between two values, read from the scale of what is left."""
    ratio = output.detach() / plain
    left = ratio[ratio.abs() > 1e-6]
    if not len(left):
        wrong("values that are not all 0", "only zeros")
    scale, share = float(left.double().mean()), 1 - len(left) / ratio.numel()
    if not torch.allclose(left, torch.full_like(left, scale), rtol=1e-3):
        wrong("one factor at all values that are not 0", f"factors from {left.min():.4f} to {left.max():.4f}")
    rate = 1 - 1 / scale
    if abs(rate - share) > 0.03:
        wrong(f"a share of {rate:.3f} that is 0, as for the factor {scale:.3f}", f"{share:.3f}")
    return rate


def has_rate(what: str, output: Tensor, plain: Tensor, rate: float) -> None:
    came = rate_of(output, plain)
    if abs(came - rate) > 2e-3:
        wrong(f"rate {rate:.3g} {what}", f"{came:.3g}")


def gradients(loss: object, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of a loss with respect to each trainable parameter of the model: zeros where it has none."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        wrong("a tensor with gradients", loss)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def same_gradients(came: object, model: nn.Module, expected: Tensor, twin: nn.Module) -> None:
    """Compare the gradients of a loss of the model with those of the expected one, which a twin of the model has."""
    ours, right = gradients(came, model), gradients(expected, twin)
    for name, gradient in right.items():
        same(f"the gradient of {name}", ours[name], gradient, rtol=1e-3)


def squares(parameters: Iterable[Tensor]) -> Tensor:
    return torch.stack([parameter.square().sum() for parameter in parameters]).sum()


def check(function: Callable[[Solve], None]) -> Callable[[Solve], None]:
    """Enter a check under the number at the end of its name."""
    CHECKS[int(function.__name__.removeprefix("task_"))] = function
    return function


# The checks


@check
def task_1(solve: Solve) -> None:
    model, x = transparent(), torch.randn(512, 6)
    plain, quiet = plain_in(model, x), plain_in(model, x, train=False)
    module: Any = module_of(solve(model=model, rate=0.3))
    first, second = (output_of(module.train()(x)) for _ in range(2))
    has_rate("in train mode", first, plain, 0.3)
    if torch.equal(first, second):
        wrong("another mask in the next call", "the same")
    same("without dropout in the model itself, at its output,", model.train()(x), plain)
    same("without dropout in eval mode, at the output,", output_of(module.eval()(x)), quiet)
    same("without dropout in the model in eval mode, at its output,", model.eval()(x), quiet)


@check
def task_2(solve: Solve) -> None:
    model, x, y = Net(), torch.randn(20, 6), torch.randint(3, (20,))
    a, b, c = 0.02, 0.05, 0.003
    twin = copy.deepcopy(model)
    h = twin.act1(twin.norm(twin.first(x)))
    loss = F.cross_entropy(twin.head(twin.act2(twin.second(h))), y)
    loss = loss + a * squares([twin.first.weight]) + b * squares([twin.head.weight]) + c * h.abs().sum() / 20
    came = solve(model=model, x=x, y=y, a=a, b=b, c=c)
    same("a loss of", came, loss)
    same_gradients(came, model, loss, twin)


@check
def task_3(solve: Solve) -> None:
    for parts in (1, 4):
        model, strength = Net(), 0.1
        twin, batches = copy.deepcopy(model), [(torch.randn(16, 6), torch.randn(16, 3)) for _ in range(parts)]
        module = module_of(solve(model=model, strength=strength, parts=parts))
        for x, y in batches:
            output = module(x)
            if not isinstance(output, Tensor):
                wrong("a tensor as output", output)
            torch.autograd.backward(F.mse_loss(output, y) / parts)
            torch.autograd.backward(F.mse_loss(twin(x), y) / parts)
        torch.autograd.backward(strength * squares([twin.second.weight]))
        for name, expected in ((name, parameter.grad) for name, parameter in twin.named_parameters()):
            assert expected is not None
            same(f"with {parts} parts, the gradient of {name}", model.get_parameter(name).grad, expected, rtol=1e-3)


@check
def task_4(solve: Solve) -> None:
    model, x = transparent(), torch.randn(512, 6)
    plain, quiet = plain_in(model, x), plain_in(model, x, train=False)
    module: Any = module_of(solve(model=model, last=0.4, steps=8))
    for batch in range(11):
        module.train()
        has_rate(f"in batch {batch}", output_of(module(x)), plain, 0.4 * min(batch / 8, 1))
        module.eval()
        same("without dropout in eval mode, at the output,", output_of(module(x)), quiet)


@check
def task_5(solve: Solve) -> None:
    start, batches = transparent(), [torch.randn(32, 6) for _ in range(7)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "checkpoint.pt")
        torch.manual_seed(1)
        whole = solve(model=copy.deepcopy(start), batches=list(batches), path=path, resume=False)
        if not isinstance(whole, list) or len(whole) != 7:
            wrong("a list of 7 losses", whole)
        torch.manual_seed(2)
        torch.rand(5)
        rest = solve(model=Net(32), batches=list(batches), path=path, resume=True)
        equal("the losses of steps 3 to 6 after resuming", rest, whole[3:])
    # The output is act2's, so dropout doubles the mean square of the first step, whose model is still the given one.
    plain = plain_in(start, batches[0]).square().mean()
    same("a loss with dropout in the first step, about", whole[0], 2 * plain, rtol=0.15)
    equal("the number of different losses", len(set(whole)), 7)


class Stepped(Net):
    def forward(self, x: Tensor, steps: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[steps]


@check
def task_6(solve: Solve) -> None:
    model = Stepped()
    before = copy.deepcopy(model.state_dict())
    patterns = ["first.*", "*.weight", "nrom.*", "norm.weight*", "act1", "head.*"]
    reached = {
        "first.*": ["first.weight"],
        "*.weight": ["first.weight", "head.weight", "second.weight"],
        "nrom.*": [],
        "norm.weight*": [],
        "act1": [],
        "head.*": ["head.weight"],
    }
    came = solve(model=model, inputs=(torch.randn(4, 6), torch.tensor([0, 2])), patterns=patterns)
    if not isinstance(came, Mapping) or not {"reached", "why"} <= came.keys():
        wrong("a dict with 'reached' and 'why'", came)
    for pattern, names in reached.items():
        equal(f"at {pattern!r}", list(came["reached"].get(pattern, ["no entry"])), names)
    if "integer" not in str(came["why"]):
        wrong("'integers' as the reason", came["why"])
    if type(model) is not Stepped or any(not torch.equal(model.state_dict()[name], value) for name, value in before.items()):
        wrong("the model as it was", "a changed one")


@check
def task_7(solve: Solve) -> None:
    model, x = transparent(), 2 * torch.randn(512, 6) + 1
    penalty = 0.01 * squares([model.head.weight]).item()
    plain = plain_in(model, x)
    came = solve(model=model, x=x)
    if not isinstance(came, Sequence) or len(came) != 3:
        wrong("three pairs", came)
    for number, (output, measured) in enumerate(came):
        if number == 1:
            same("without dropout, in the reference pass, an output of", output, plain)
        else:
            has_rate(f"in pass {number}", output, plain, 0.5)
        same(f"in pass {number} a penalty of", measured, 0.0 if number == 1 else penalty)
    if torch.equal(came[0][0], came[2][0]):
        wrong("two masks in the first and the third pass", "the same mask")


@check
def task_8(solve: Solve) -> None:
    model, x, rate = Net(), torch.randn(10, 6), 0.4
    for _ in range(3):
        model(3 * torch.randn(64, 6) + 1)  # so that the running statistics are not those of x
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        z = twin.act2(twin.second(twin.act1(twin.norm(twin.first(x)))))
        mean = twin.head(z)
        spread = (rate / (1 - rate) * z.square() @ twin.head.weight.square().T).sqrt()  # of sums of independent masks
    came = solve(model=model, x=x, rate=rate, passes=1000)
    if not isinstance(came, Sequence) or len(came) != 2:
        wrong("two tensors", came)
    same("a mean of", came[0], mean, rtol=0, atol=6 * float(spread.max()) / 1000**0.5)
    same("a standard deviation of", came[1], spread, rtol=0.15, atol=0)
    if any(not part.training for part in model.modules()):
        wrong("all of the model in train mode, as before", "a part in eval mode")
    for name, value in before.items():
        same(f"{name} as it was,", model.state_dict()[name], value, rtol=0, atol=0)


@check
def task_9(solve: Solve) -> None:
    model, x = Net(), torch.randn(20, 6)
    twin = copy.deepcopy(model)
    norms = twin.act1(twin.norm(twin.first(x))).norm(dim=1)
    came = solve(model=model, x=x, strength=0.1, target=2.0, later=0.7)
    if not isinstance(came, Sequence) or len(came) != 2 or any(not isinstance(each, Mapping) for each in came):
        wrong("a list of two dicts", came)
    for strength, penalties in zip((0.1, 0.7), came, strict=True):
        equal("the names of the penalties", sorted(penalties), ["row_target"])
        expected = strength * (norms - 2.0).square().mean()
        same("a penalty of", penalties["row_target"], expected)
        same_gradients(penalties["row_target"], model, expected, twin)


@check
def task_10(solve: Solve) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, x = transparent(), torch.randn(512, 6)
    plain = plain_in(model, x)
    came = solve(model=model, rate=0.2, backend=counting)
    if not isinstance(came, Sequence) or len(came) != 2:
        wrong("(step, change)", came)
    step, change = came
    outputs = []
    for rate in (0.2, 0.5, 0.3, 0.6):
        change(rate)
        outputs += [step(x), step(x)]
        has_rate("after the change", outputs[-1], plain, rate)
    equal("the number of compiled graphs", len(graphs), 1)
    if torch.equal(outputs[0], outputs[1]):
        wrong("another mask in the next call", "the same")


@check
def task_11(solve: Solve) -> None:
    import yaml  # noqa: PLC0415

    model, x = transparent(), torch.randn(512, 6)
    other = copy.deepcopy(model)
    plain = plain_in(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        module = module_of(solve(model=model, rate=0.35, path=str(path)))
        first = output_of(module(x))
        has_rate("in the first module", first, plain, 0.35)
        if not path.is_file():
            wrong("a file at path", "none")
        text = path.read_text()
        if not isinstance(yaml.safe_load(text), dict) or text.count("0.35") != 1:
            wrong("a file of YAML that names the rate once", text)
        torch.manual_seed(1)
        twin = module_of(solve(model=copy.deepcopy(other), rate=0.35, path=str(path)))
        same("by the seed, the same mask, with the output", output_of(twin(x)), first)
        again = module_of(solve(model=other, rate=None, path=str(path)))
        same("the mask of the first module, with the output", output_of(again(x)), first)
        path.write_text(text.replace("0.35", "0.65"))
        edited = module_of(solve(model=copy.deepcopy(other), rate=None, path=str(path)))
        has_rate("after the file was edited", output_of(edited(x)), plain, 0.65)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.back(self.wide(self.norm(x)).relu()))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers, self.head = nn.Embedding(20, 8), nn.Sequential(*(Layer() for _ in range(4))), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.layers(self.words(ids)).mean(1)))


@check
def task_12(solve: Solve) -> None:
    model, lr, decay, factor = Words(), 1e-3, 0.05, 0.5
    optimizer = solve(model=model, lr=lr, decay=decay, factor=factor)
    if not isinstance(optimizer, torch.optim.AdamW):
        wrong("an AdamW", optimizer)
    groups = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    equal("the number of parameters", len(groups), len(list(model.parameters())))
    found = {id(parameter): group for parameter, group in groups}
    for name, parameter in model.named_parameters():
        if id(parameter) not in found:
            wrong(f"{name} in a group", "in none")
        layer = re.match(r"layers\.(\d)", name)
        power = 0 if name.startswith("head") else 4 - int(layer[1]) if layer else 5
        decayed = name.endswith("weight") and "norm" not in name and name != "words.weight"
        same(f"for {name} a learning rate of", found[id(parameter)]["lr"], lr * factor**power, atol=0)
        same(f"for {name} a weight decay of", found[id(parameter)]["weight_decay"], decay if decayed else 0.0)


@check
def task_13(solve: Solve) -> None:
    model, x, strength, lr, steps = nn.Linear(12, 1), torch.randn(200, 12), 0.2, 0.1, 60
    y = x[:, :2].sum(1, keepdim=True) - x[:, 2:3] / 2 + torch.randn(200, 1) / 10
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    for _ in range(steps):
        error = 2 * (x @ w.T + b - y) / 200
        moved = w - lr * error.T @ x
        w, b = moved.sign() * (moved.abs() - lr * strength).clamp(min=0), b - lr * error.sum(0)
    assert 5 < int((w == 0).sum()) < 12
    solve(model=model, x=x, y=y, strength=strength, lr=lr, steps=steps)
    equal("the number of weights that are exactly 0", int((model.weight == 0).sum()), int((w == 0).sum()))
    same("a weight of", model.weight, w)
    same("a bias of", model.bias, b)


@check
def task_14(solve: Solve) -> None:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    model: Any = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5)
    nn.init.normal_(model.head.weight)
    x, last = torch.randn(1, 3, 16, 16).repeat(256, 1, 1, 1), 0.5
    twin, kind, state = copy.deepcopy(model).eval(), type(model), copy.deepcopy(model.state_dict())

    def with_masks(masks: Sequence[float]) -> Tensor:
        z = twin.norm_pre(twin.patch_drop(twin._pos_embed(twin.patch_embed(x[:1]))))
        for block, first, second in zip(twin.blocks, masks[::2], masks[1::2], strict=True):
            z = z + first * block.ls1(block.attn(block.norm1(z)))
            z = z + second * block.ls2(block.mlp(block.norm2(z)))
        return torch.as_tensor(twin.forward_head(twin.norm(z)))[0]

    solve(model=model, last=last)
    if type(model) is not kind and not isinstance(model, kind):
        wrong(f"the class {kind.__name__}", type(model).__name__)
    equal("the keys of state_dict", list(model.state_dict()), list(state))
    with torch.no_grad():
        choices = [(1.0,), (1.0,), (0.0, 4 / 3), (0.0, 4 / 3), (0.0, 2.0), (0.0, 2.0)]
        masks = list(itertools.product(*choices))
        expected = torch.stack([with_masks(each) for each in masks])
        output = model.train()(x)
        if not isinstance(output, Tensor):
            wrong("a tensor as output", output)
        distance = torch.cdist(output, expected, compute_mode="donot_use_mm_for_euclid_dist")
        if (distance.min(1).values > 1e-3).any():
            wrong("outputs with each branch dropped or scaled as asked", f"another one, by {float(distance.min(1).values.max()):.3f}")
        seen = torch.tensor(masks)[distance.argmin(1)]
        for branch, rate in ((2, last / 2), (3, last / 2), (4, last), (5, last)):
            share = float((seen[:, branch] == 0).float().mean())
            if abs(share - rate) > 0.12:
                wrong(f"branch {branch} dropped in a share of {rate} of the examples", f"{share:.2f}")
        same("in eval mode the output", model.eval()(x), twin(x), rtol=1e-3)
    for name, value in state.items():
        same(f"{name} as it was,", model.state_dict()[name], value, rtol=0, atol=0)


@check
def task_15(solve: Solve) -> None:
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: Any = BertModel(config, add_pooling_layer=False)
    ids, mask = torch.randint(1, 40, (3, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    batch, strength = {"input_ids": ids * mask, "attention_mask": mask}, 0.3
    twin, values = copy.deepcopy(model), list[Tensor]()
    for layer in twin.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, inputs, output: values.append(output))
    twin(**batch)
    expected = strength * torch.stack([value[mask.bool()].abs().mean() for value in values]).mean()
    came = solve(model=model.train(), batch=batch, strength=strength)
    same("a penalty of", came, expected)
    same_gradients(came, model, expected, twin)


@check
def task_16(solve: Solve) -> None:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    last = transparent().head
    net: Any = nn.Sequential(nn.Linear(6, 32), nn.Sigmoid(), last)
    model, x = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"])), torch.randn(512, 6)
    plain = plain_in(model, x)  # the adapters begin with B = 0, so this is what layer 1 returns
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    came = solve(model=model, x=x, rate=0.25, strength=0.1)
    if not isinstance(came, Sequence) or len(came) != 2:
        wrong("(output, penalty)", came)
    output, penalty = came
    has_rate("at layer 1", output, plain, 0.25)
    expected = 0.1 * squares(adapters.values())
    same("a penalty of", penalty, expected)
    same_gradients(penalty, model, expected, model)
    (output.sum() + penalty).backward()
    equal("the number of adapters' weights with a gradient", sum(p.grad is not None for p in adapters.values()), 4)
    equal("frozen weights with a gradient", [name for name in frozen if model.get_parameter(name).grad is not None], [])


@check
def task_17(solve: Solve) -> None:
    model, x, y = Net(), torch.randn(64, 6), torch.randint(3, (64,))
    with torch.no_grad():
        model.second.weight.mul_(4)
    twin = copy.deepcopy(model)
    weights = [twin.first.weight, twin.second.weight, twin.head.weight]
    found = torch.autograd.grad(F.cross_entropy(twin(x), y), weights)
    came = solve(model=model, x=x, y=y)
    if not isinstance(came, Sequence) or len(came) != 3:
        wrong("three numbers", came)
    for name, pull, weight, gradient in zip(("first", "second", "head"), came, weights, found, strict=True):
        same(f"at {name} a pull of", pull, float(0.02 * weight.norm() / gradient.norm()), rtol=0.01)


@check
def task_18(solve: Solve) -> None:
    model, x = Net(), torch.randn(8, 6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.svg"
        came = solve(model=model, x=x, path=str(path))
        if not path.is_file():
            wrong("a file at path", "none")
        root = ElementTree.parse(path).getroot()
    equal("the kind of file", root.tag.rpartition("}")[2], "svg")
    text = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text"))
    for word in ("first", "norm", "second", "act2", "head", "0.25"):
        if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
            wrong(f"{word!r} in the picture", text)
    if not isinstance(came, Mapping):
        wrong("a dict", came)
    equal("the sites of the two regularizers", sorted(list(sites) for sites in came.values()), [["act2"], ["head.weight"]])
    for name in came:
        if not re.search(rf"(?<!\w){re.escape(str(name))}(?!\w)", text):
            wrong(f"{name!r} in the picture", text)


@check
def task_19(solve: Solve) -> None:
    import onnx  # noqa: PLC0415
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

    model, batches = Net(), [torch.randn(16, 6) for _ in range(4)]
    dry, begun = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(dry.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        dry(x).square().mean().backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        solve(model=model, batches=batches, path=str(path))
        if not path.is_file():
            wrong("a file at path", "none")
        file = onnx.load(path)
        equal("the number of outputs", len(file.graph.output), 1)
        outputs: Any = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: batches[0].numpy()})
        output = torch.from_numpy(outputs[0])
    same("the output of the trained model in eval mode", output, plain_in(model, batches[0], train=False), rtol=1e-3)
    for name, parameter in model.named_parameters():
        if name != "first.bias" and torch.equal(parameter, begun.get_parameter(name)):  # batch norm takes first.bias away
            wrong(f"a trained {name}", "the one that was given")
    if torch.allclose(model.head.weight, dry.head.weight, atol=1e-6):
        wrong("a model that was trained with dropout", "one that was trained without")
    extra = {node.op_type for node in file.graph.node} & {"Dropout", "RandomUniform", "RandomUniformLike", "Bernoulli", "RandomNormal"}
    domains = {node.domain for node in file.graph.node} - {"", "ai.onnx"}
    equal("operations of dropout, and operations that are not ONNX's,", sorted(extra | domains), [])


# The command


def loaded(path: Path) -> Solve:
    """Run the file of a solution, and return its ``solve``."""
    loader = SourceFileLoader(f"solution_{path.stem}", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses and pickle look there
    loader.exec_module(module)
    solve: Solve = module.solve
    return solve


def verdict(number: int, solve: Solve) -> str:
    """Run the check of a task on a solution; return ``right``, or ``wrong: `` and what was expected and what came."""
    torch.manual_seed(number)
    try:
        CHECKS[number](solve)
    except Wrong as found:
        return f"wrong: {found}"
    except Exception as error:
        return f"wrong: expected no error, came {located(error)}"
    return "right"


def located(error: Exception) -> str:
    """Return an error on one line, with its place in the solution, or else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    place = next(iter(outside), frames[-1])  # a check calls the solution, so its frames come first
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(place.filename).name}:{place.lineno})"


def answer(number: int, file: Path) -> str:
    """Load a solution and check it. What it prints, as the exporter to ONNX does, is not shown."""
    if not file.is_file():
        return f"wrong: expected the file {file}, came none"
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            solve = loaded(file)
        except Exception as error:
            return f"wrong: expected a file that defines solve, came {located(error)}"
        return verdict(number, solve)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2 or (arguments[0] != "all" and arguments[0] not in map(str, CHECKS)):
        print(__doc__)
        return 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    which, path = arguments[0], Path(arguments[1])
    solutions = {number: path / f"{number:02}.py" for number in CHECKS} if which == "all" else {int(which): path}
    failed = 0
    for number, file in solutions.items():
        said = answer(number, file)
        print(number, said, flush=True)
        failed += said != "right"
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
