"""What is checked of a foreign model: regularized with strength 0, in three ways, it is the model, and ``verify`` says so."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphreg
from foreign.nnsmith_models import Drawn, drawn
from graphreg.errors import GraphRegError
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1, WeightL2

WAYS = ("example", "no example", "in place")
FRONT_END: Literal["auto"] = "auto"


class Wrong(Exception):
    """What graphreg gives is not what the model gives."""


def checked(seed: int, inductor: bool = False) -> dict[str, str]:
    """By check: ``ok``, ``refused: …``, ``torch: …`` for what torch does wrong by itself, or ``wrong: …``.

    ``model`` is what NNSmith and the plain model did: no other check runs where that is not ``ok``.
    """
    results: dict[str, str] = {}
    try:
        made = drawn(seed)
        plain = _run(made.model, made)
    except Exception as error:  # NNSmith finds no model, or one that torch does not run
        return {"model": f"none: {type(error).__name__}: {_line(error)}"}
    if not _same(_run(made.model, made), plain):
        return {"model": "none: it is not the same twice"}
    results["model"] = "ok"
    regs = _regularizers(made, random.Random(seed))
    for way in WAYS:
        results[way] = _told(lambda way=way: _way(made, plain, regs, way))  # type: ignore[misc]
    results["verify"] = _told(lambda: _verify(made, regs))
    for backend in ("aot_eager", *["inductor"] * inductor):
        results[backend] = _told(lambda backend=backend: _compiled(made, plain, regs, backend))  # type: ignore[misc]
    return results


def _told(check: Callable[[], str]) -> str:
    try:
        return check()
    except GraphRegError as error:
        return f"refused: {_line(error)}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None:
            if isinstance(inner, GraphRegError):
                return f"refused: {_line(inner)}"
            inner = inner.__cause__ or inner.__context__
        return f"wrong: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text.partition("Developer debug context: ")[2][:300] or text[:300]  # of what Dynamo wraps, what was raised


def _regularizers(made: Drawn, rng: random.Random) -> list[Any]:
    """Splices and penalties of strength 0, at sites that take them; a site that does not is left out."""
    try:
        traced = graphreg.trace(copy.deepcopy(made.model), made.inputs, FRONT_END)
    except GraphRegError:
        return [WeightL2("**", 0.0)]
    sites = [site.name for site in traced.values if site.selectable]
    found: list[Any] = [WeightL2("*", 0.0)] if any(p.dim() > 1 and p.requires_grad for p in made.model.parameters()) else []
    more = [cls(site, 0.0) for cls in (BernoulliDropout, GaussianNoise, HiddenL1) for site in rng.sample(sites, min(len(sites), 3))]
    if _is_taken(made, more):
        return [*found, *more]
    return [*found, *(reg for reg in more if _is_taken(made, [reg]))]


def _is_taken(made: Drawn, regs: list[Any]) -> bool:
    try:
        graphreg.regularize(copy.deepcopy(made.model), *regs, example_inputs=made.inputs, front_end=FRONT_END)(*_given(made))
    except GraphRegError:
        return False
    return True


def _given(made: Drawn) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_(x.is_floating_point()) for x in made.inputs)


def _run(model: Any, made: Drawn, penalties: bool = False) -> tuple[list[Tensor], list[Tensor | None]]:
    """The output's tensors, and the gradients of parameters and inputs."""
    given = _given(made)
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else list(made.model.parameters())
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(3)
    output = model(*given)
    output = output[0] if penalties else output
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    smooth = [leaf.double().sum() for leaf in leaves if leaf.requires_grad and leaf.is_floating_point()]
    if smooth:
        torch.stack(smooth).sum().backward()  # type: ignore[no-untyped-call]
    graded = [None if t.grad is None else t.grad.clone() for t in (*parameters, *given)]
    return [leaf.detach().clone() for leaf in leaves], graded


Ran = tuple[list[Tensor], list[Tensor | None]]


def _same(ours: Ran, plain: Ran) -> bool:
    try:
        _compare(ours, plain, 0.0)
    except Wrong:
        return False
    return True


def _compare(ours: Ran, plain: Ran, tolerance: float, gradients: float | None = None) -> None:
    """Outputs and gradients: to a tolerance, of the largest value. No gradient is a gradient of zeros."""
    if len(ours[0]) != len(plain[0]):
        raise Wrong(f"{len(ours[0])} outputs, expected {len(plain[0])}")
    pairs = [(f"output {i}", a, b, tolerance) for i, (a, b) in enumerate(zip(ours[0], plain[0], strict=True))]
    bound = tolerance if gradients is None else gradients
    for i, (one, other) in enumerate(zip(ours[1], plain[1], strict=True)):
        if one is not None or other is not None:
            a = torch.zeros_like(other) if one is None else one  # type: ignore[arg-type]
            b = torch.zeros_like(a) if other is None else other
            pairs.append((f"gradient {i}", a, b, bound))
    for what, a, b, near in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Wrong(f"{what}: {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}")
        if not _near(a, b, near):
            raise Wrong(f"{what}: {a.flatten()[:6].tolist()}, expected {b.flatten()[:6].tolist()}")


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not b.is_floating_point() or tolerance == 0:
        return bool(torch.equal(a, b)) or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    eps = tolerance * max(1.0, torch.finfo(b.dtype).eps / torch.finfo(torch.float32).eps)
    finite = b.double()[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(a.double(), b.double(), rtol=eps, atol=eps * max(scale, 1e-3), equal_nan=True))


def _way(made: Drawn, plain: Ran, regs: list[Any], way: str) -> str:
    model = copy.deepcopy(made.model)
    if way == "in place":
        graphreg.regularize_(model, *regs, front_end=FRONT_END, penalties="return", missing="ignore")
        _compare(_run(model, made, penalties=True), plain, 0.0, 1e-5)
        return "ok"
    example = made.inputs if way == "example" else None
    module = graphreg.regularize(model, *regs, example_inputs=example, front_end=FRONT_END, missing="ignore")
    for mode in (True, False):
        expected = plain if mode else _run(copy.deepcopy(model).eval(), made)
        try:
            ours = _run(module.train(mode), made, penalties=True)
        except GraphRegError as error:
            if way == "no example":
                raise
            raise Wrong(f"it refuses its own example: {_line(error)}") from error
        _compare(ours, expected, 0.0, 1e-5)
    return "ok"


def _verify(made: Drawn, regs: list[Any]) -> str:
    model = copy.deepcopy(made.model)
    module = graphreg.regularize(model, *regs, example_inputs=made.inputs, front_end=FRONT_END, missing="ignore")
    try:
        graphreg.verify(model, module, *made.inputs)
    except GraphRegError as error:
        raise Wrong(_line(error)) from error  # a correct module
    return "ok"


def _compiled(made: Drawn, plain: Ran, regs: list[Any], backend: str) -> str:
    """A step of the compiled module. Where the plain model compiled is as far from itself, that is torch's."""
    module = graphreg.regularize(copy.deepcopy(made.model), *regs, example_inputs=made.inputs, front_end=FRONT_END, missing="ignore")
    torch._dynamo.reset()
    try:
        _compare(_run(torch.compile(module, backend=backend, fullgraph=True, dynamic=False), made, penalties=True), plain, 1e-4)
    except Exception as error:
        if isinstance(error, GraphRegError) or (theirs := _torchs_own(made, plain, backend)) == "":
            raise
        return f"torch: {theirs}"
    return "ok"


def _torchs_own(made: Drawn, plain: Ran, backend: str) -> str:
    torch._dynamo.reset()
    try:
        _compare(_run(torch.compile(made.model, backend=backend, fullgraph=True, dynamic=False), made), plain, 1e-4)
    except Exception as error:
        return f"the plain model compiled: {_line(error)}"
    return ""
