"""What ``keep=`` costs under Inductor, and what forward hooks do under ``fullgraph=True`` beside it."""

from __future__ import annotations

import contextvars
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from page import arguments, chosen, progress, row
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import graphreg
from workloads import WORKLOADS

Hook = Callable[[nn.Module, Any, Tensor], None]
# activations that backward needs anyway
KEPT = {"MLP": "layers.[1357]", "transformer": "act", "batch-norm": "body.[258]", "resnet18": "layer?"}


def saved(run: Callable[[], Any]) -> tuple[Any, int]:
    """What ``run`` returns, and how many bytes of distinct storages autograd saves in it."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


class Hooked(nn.Module):
    """The other way: hooks, registered before anything is compiled, put the values into a dict, which the forward returns."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        super().__init__()
        self.model, self.found = model, dict[str, Tensor]()
        for path in paths:
            model.get_submodule(path).register_forward_hook(self.hook(path))

    def hook(self, path: str) -> Hook:
        return lambda module, args, output: self.found.update({path: output})

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(x), dict(self.found)


def costs(workload: str, rounds: int) -> None:
    """A row: CPU times of forwards and steps, and what autograd saves. A step's loss reads the output alone, or the values, too."""
    make, shape = WORKLOADS[workload]
    pattern = next(pattern for name, pattern in KEPT.items() if workload.startswith(name))
    torch._dynamo.reset()
    module, x = graphreg.regularize(make(), keep=pattern), torch.randn(shape)
    forms = {"plain": make(), "keep": module, "hooks": Hooked(make(), list(module(x).values))}
    sizes, times = dict[str, int](), dict[str, list[float]]()

    def step(name: str, what: str) -> None:
        with torch.set_grad_enabled(what != "forward"):
            result = forms[name](x)
        output, values = (result, {}) if name == "plain" else (result[0], result[-1])
        loss = output.square().mean()
        if what == "values":
            loss = loss + sum(value.square().mean() for value in values.values())
        if what != "forward":
            loss.backward()

    variants = [(name, what) for what in ("forward", "output", "values") for name in forms if (name, what) != ("plain", "values")]
    for name, form in forms.items():
        form.compile(fullgraph=True)
        sizes[name] = saved(lambda form=form: form(x))[1]  # type: ignore[misc]
    for i in range(-2, rounds):  # two rounds to warm up
        for name, what in variants:
            forms[name].zero_grad()
            start = time.process_time()
            step(name, what)
            if i >= 0:
                times.setdefault(f"{name} {what}", []).append(time.process_time() - start)

    def ratio(first: str, second: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(times[first], times[second], strict=True)):.2f}"

    beside = {"keep forward": "plain forward", "keep output": "plain output"}
    ratios = [ratio(*pair) for pair in (*beside.items(), ("keep output", "hooks output"), ("keep values", "hooks values"))]
    ms = f"{statistics.median(times['plain output']) * 1e3:.0f}"
    print(row(workload, len(module(x).values), ms, *ratios, *(f"{size / 1e6:.1f}" for size in sizes.values())), flush=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.out = nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.fc(x)))


_variable: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("feature", default=None)


def hooked(layer: str, hook: Callable[[dict[str, Any]], Hook], late: bool = False, backward: bool = False) -> str:
    """What a compiled net gives whose layer has this hook: the value, a wrong one, nothing, or an error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x, found = Net(), torch.randn(4, 6), dict[str, Any]()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    if late:
        compiled(x)
    net.get_submodule(layer).register_forward_hook(hook(found))
    try:
        output = compiled(x)
        if backward:
            output.sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    value = found.get("value", _variable.get())
    if value is None:
        return "nothing, and no error"
    right = net.fc(x) if layer == "fc" else net.fc(x).relu()
    return "the value" if torch.equal(value, right) or backward else "a wrong value, and no error: the ReLU has overwritten it"


def into_dict(found: dict[str, Any]) -> Hook:
    return lambda module, args, output: found.update(value=output)


def into_variable(found: dict[str, Any]) -> Hook:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        _variable.set(output)

    return hook


def gradient(found: dict[str, Any]) -> Hook:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda grad: found.update(value=grad))

    return hook


def retained(found: dict[str, Any]) -> Hook:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found["value"] = output

    return hook


HOOKS: dict[str, Callable[[], str]] = {
    "a hook that stores the value in a dict": lambda: hooked("relu", into_dict),
    "the same, before an in-place ReLU": lambda: hooked("fc", into_dict),
    "the same, registered after the first call": lambda: hooked("relu", into_dict, late=True),
    "a hook that stores it in a ContextVar": lambda: hooked("relu", into_variable),
    "a hook on the value's gradient (Grad-CAM)": lambda: hooked("relu", gradient, backward=True),
    "`retain_grad` (Grad-CAM)": lambda: hooked("relu", retained, backward=True),
}


def kept_values() -> str:
    """By ``keep=``: both values, and the gradients of a loss that reads them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 6)
    module = graphreg.regularize(net, keep=("fc", "relu"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    values = compiled(x).values
    right = [net.fc(x), net.fc(x).relu()]
    found, wanted = (torch.autograd.grad(sum(v.square().sum() for v in of), net.fc.weight) for of in (values.values(), right))  # type: ignore[union-attr,arg-type]
    is_right = all(map(torch.equal, values.values(), right)) and torch.allclose(found[0], wanted[0])
    return "the value, also before an in-place ReLU, with gradients" if is_right else "wrong"


def main() -> None:
    options = arguments(__doc__, ("--rounds", 30), ("--threads", 1), names=WORKLOADS)
    torch.set_num_threads(options.threads)
    print(
        row(
            "workload", "kept values", "step of plain, ms", "forward without gradients, `keep=` / plain", "step, `keep=` / plain",
            "step, `keep=` / hooks", "step with the values in the loss, `keep=` / hooks",
            "saved by plain, MB", "saved by `keep=`, MB", "saved by hooks, MB",
        )
    )  # fmt: skip
    print(row(*["---"] * 10))
    for workload in chosen(WORKLOADS, options.only):
        progress(f"keep: {workload}")
        costs(workload, options.rounds)
    print(f"\n{row('under `fullgraph=True`', 'what comes out')}")
    print(row("---", "---"))
    for name, run in HOOKS.items():
        print(row(name, run()))
    print(row("`keep=`", kept_values()))


if __name__ == "__main__":
    main()
