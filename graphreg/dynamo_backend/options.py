"""``graphreg.backend``, which checks the options and makes a ``Backend``; and the backend that torch finds by the name ``"graphreg"``."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphreg.compiler.inductor_passes import with_our_passes
from graphreg.dynamo_backend.backend import Backend
from graphreg.dynamo_backend.fallback import watch
from graphreg.dynamo_backend.subgraph import Inner
from graphreg.errors import GraphRegError, RegularizerError, check_flag, raising, shown, suggestions_text
from graphreg.ir.selector import Missing
from graphreg.pipeline import check_options
from graphreg.planning.kept import refuse_keep
from graphreg.planning.keywords import from_keywords, instances
from graphreg.planning.native_dropout import OwnDropout, read_option
from graphreg.planning.plan import named_once
from graphreg.recipes.arguments import RecipeLike, by_recipe
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.rewriting.instantiate import seed
from graphreg.runtime.attach import Penalties, Scale
from graphreg.session.hosts import backend_host
from graphreg.torch_internals.dynamo import asking_wrapper, backend_named, tells_result
from graphreg.torch_internals.inductor import inductor_with
from graphreg.torch_internals.versions import warn_if_untested
from graphreg.tracing.dynamo_graphs import BACKEND


def backend(
    *regularizers: Regularizer | Iterable[Regularizer],
    inner: str | Callable[..., Any] = "inductor",
    options: Mapping[str, Any] | None = None,
    rng: int | torch.Generator | None = None,
    missing: Missing = "error",
    penalties: Penalties = "return",
    scale: Scale | None = None,
    own_dropout: OwnDropout = "keep",
    recipe: RecipeLike | None = None,
    prove: bool = True,
    **keywords: Any,
) -> Backend:
    """Make a backend for ``torch.compile(model, backend=...)`` that regularizes every graph that Dynamo captures of one model.

    The model itself is not changed. If a selector matches nothing in any graph, the first call raises NoMatchError at its end.

    Args:
        regularizers: The regularizers, as in ``regularize``.
        inner: The backend that compiles the regularized graphs: a name that torch knows, or a callable.
        options: Options of the inner backend.
        rng: As in ``regularize``.
        missing: As in ``regularize``.
        penalties: With ``"return"``, the backend's method ``penalties()`` returns the penalties after a call. With ``"attach"``, their
            gradients join the backward pass of the model's outputs.
        scale: The factor of the gradient of attached penalties, as in ``regularize``.
        own_dropout: As in ``regularize``.
        recipe: As in ``regularize``. Its front end is ignored: torch.compile captures the graphs.
        prove: Whether to use each graph only after graphreg's form of it, without additions, gave the same as the graph that Dynamo
            captured, on the inputs of the first call. This takes two runs of the graph.
        **keywords: Regularizers by key, as in ``regularize``.

    Raises:
        NoMatchError: A keyword is unknown.
        RegularizerError: A regularizer, an option or the value of one is not allowed.
        GraphRegError: ``penalties="attach"`` needs a newer torch.
    """
    if recipe is not None:
        return by_recipe(backend, locals())
    warn_if_untested()
    refuse_keep(keywords, "graphreg.backend", "a compiled call returns what the model returns")
    for name in ("blocks", "compile", "front_end", "example_inputs", "verify"):
        if name in keywords:
            raise RegularizerError(f"{name}= is no option of graphreg.backend: torch.compile captures the graphs, from the calls.")
    check_options(rng, missing, penalties, scale)
    own_dropout = read_option(own_dropout)
    check_flag("prove", prove)
    every = [*instances(regularizers), *from_keywords(keywords)]
    named = dict(named_once(every))
    for name, regularizer in named.items():
        if isinstance(regularizer, Splice) and regularizer.rng is not None:  # otherwise each graph would draw another seed from it
            named[name] = dataclasses.replace(regularizer, rng=seed(regularizer.rng))
    made = _inner(inner, options)
    attaches = penalties == "attach" and any(not isinstance(r, Splice) for r in named.values())
    if attaches and not tells_result():
        raise GraphRegError(
            f"penalties='attach' in a backend needs torch 2.12 or newer, and this is torch {torch.__version__}, which does not "
            "show what a compiled call returns. If the model returns a tensor that no graph computed, its backward would lack the "
            "penalties, unnoticed. Use penalties='return' and add backend.penalties() to the loss, or graphreg.regularize."
        )
    if attaches and scale is None:
        warnings.warn(
            "penalties='attach': a backend does not see the loss, so it cannot know how the loss is scaled (a GradScaler, gradient "
            "accumulation); penalties are attached with scale 1. Pass scale=1 if that is right; else pass the scaler or the factor.",
            stacklevel=2,
        )
    # Dynamo calls no backend if it captures no graph, and then nothing would be regularized,
    # unnoticed.
    watch()
    return Backend(named, seed(rng), made, missing, penalties, scale, own_dropout, prove)


def _inner(inner: Any, options: Mapping[str, Any] | None) -> Inner:
    """Return the inner backend as a function of a graph and example inputs."""
    if not isinstance(inner, str):
        if not callable(inner) or isinstance(inner, (type, nn.Module)):
            raise RegularizerError(f"inner={shown(inner)} is no backend; give a name of torch.compiler.list_backends(None), or a callable.")
        if isinstance(inner, Backend):
            raise RegularizerError("inner= is a backend of graphreg's already; give all regularizers to one backend.")
        function = inner
    else:
        known = sorted({*torch.compiler.list_backends(None), "inductor"} - {"graphreg"})
        if inner not in known:
            raise RegularizerError(
                f"inner={shown(inner)} is no backend that torch knows.{suggestions_text(inner, known)} "
                "torch.compiler.list_backends(None) lists them."
            )
        if inner == "inductor":
            return _inductor(options)
        function = backend_named(inner)
    more = {"options": dict(options)} if options else {}
    accepted = inspect.signature(function).parameters
    theirs = str(getattr(function, "__module__", "")).startswith("torch.")  # torch's own backends accept any keyword and ignore it
    if more and "options" not in accepted and (theirs or all(p.kind is not p.VAR_KEYWORD for p in accepted.values())):
        raise RegularizerError(f"options={options!r} are not allowed: the inner backend {inner!r} takes no options.")

    def compiled(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        result: Callable[..., Any] = function(gm, inputs, **more)
        return result

    return compiled


def _inductor(options: Mapping[str, Any] | None) -> Inner:
    try:
        return inductor_with(with_our_passes(options or {}))
    except RuntimeError as error:
        raise RegularizerError(f"options={dict(options or {})!r} are not allowed: {str(error).splitlines()[0]}") from None


def backend_of(compiled: Any) -> Backend:
    """Return the backend that a model was compiled with, also if the backend was given by name. Raise GraphRegError if there is none."""
    made = backend_host(compiled)
    if not isinstance(made, Backend):
        raise GraphRegError(
            f"{type(compiled).__name__} was not compiled with a backend of graphreg's, or was compiled with it by name and not yet called. "
            "Give what torch.compile(model, backend=graphreg.backend(...)) returned."
        )
    return made


def __getattr__(name: str) -> Any:
    """Return the function ``by_name``, which torch looks up when it first needs the backend, and watch Dynamo's compilations from then on.

    So the import of this file registers no callback with Dynamo, but the use of the backend by its name does. Without the callback, a call
    for which Dynamo captures no graph would go unnoticed.
    """
    if name != "by_name":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    watch()
    return _by_name


def _by_name(gm: fx.GraphModule, inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
    """Compile a graph for ``torch.compile(model, backend="graphreg", options={...})``; the options are those of ``graphreg.backend``.

    The options are checked at the first call of the model, because torch does not call the backend before that.
    """
    holder = asking_wrapper()
    try:
        made = getattr(holder, BACKEND, None)
        if made is None:
            if "mode" in keywords:
                raise RegularizerError(f"mode={keywords['mode']!r} is Inductor's; write options={{'options': ...}} for the inner backend.")
            if "options" not in keywords:
                raise RegularizerError(
                    "torch.compile(model, backend='graphreg') was given no options, so there is nothing to do. Name regularizers: "
                    "options={'hidden_dropout': 0.1}."
                )
            made = backend(**keywords["options"])
            # torch calls this function once for each graph, and all graphs of a model have one
            # backend.
            setattr(holder, BACKEND, made)
        return made(gm, inputs)
    except GraphRegError as error:
        return raising(error)
    except TypeError as error:
        return raising(RegularizerError(f"options={keywords.get('options')!r} are not allowed: {error}."))
