"""The error message for a model that torch.fx cannot trace: the likely cause first, then what to do, the likely cure first."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback

from torch import Tensor, fx, nn

from graphreg.ir.source_location import LIBRARY_FOLDERS
from graphreg.tracing.checkpoints import CHECKPOINTS, CURE

_SHOWN = 8  # arguments that an error message lists
_PYTHONS = sysconfig.get_path("stdlib")
# what torch says of t.expand(n, 4), where n is a size of an input and t a tensor that is no traced value
_TOO_MANY = re.compile(r"(\w+)\(\) takes \d+ positional arguments? but \d+ were given")
# what torch says of torch.FloatTensor(n, 4) or torch.LongTensor(x), which no trace sees: these classes are written in C
_OLD_CONSTRUCTOR = re.compile(r"not a storage '|new\(\) received an invalid combination of arguments")


def refusal(model: nn.Module, error: Exception, examples: bool) -> str:
    """Return the error message for a model that cannot be traced.

    Args:
        model: The model.
        error: What its forward, or torch.fx, raised during the trace.
        examples: Whether example inputs were given.
    """
    begin = f"{type(model).__name__} cannot be traced symbolically{location(error)}"
    if isinstance(error, RecursionError):
        return (
            f"{begin}: Python's recursion limit was reached, "
            "although graphreg raises it as far as the nesting of modules needs. Either the model nests calls of other functions too "
            "deeply, or a function calls itself until a tensor has a certain value, and a trace has no values. If the depth is intended, "
            "raise the limit (sys.setrecursionlimit)."
        )

    why = str(error).strip() or type(error).__name__
    if why == CHECKPOINTS:
        return f"{begin} ({why}). {CURE[0].upper()}{CURE[1:]}."
    # the other sentences explain torch.fx.Proxy, which a user of graphreg does not see
    if isinstance(error, fx.proxy.TraceError):
        why = why.partition(". ")[0]

    if (given := _TOO_MANY.fullmatch(why)) and hasattr(Tensor, given[1]):
        why += f"; of a tensor that is the same at each call, torch takes traced sizes as one tuple: t.{given[1]}((n, -1))"
    if _OLD_CONSTRUCTOR.match(why):
        why = (
            "torch.Tensor and the classes of one dtype, such as torch.FloatTensor, take no traced values. Write torch.empty(n, 4) for "
            "torch.FloatTensor(n, 4), and x.long() for torch.LongTensor(x)"
        )

    # without its first letter: it begins a sentence in one message, and goes on in the other
    step = (
        "ove that step into a submodule of its own, which then becomes an opaque module, or into a function marked with torch.fx.wrap. "
        "If the step branches on a tensor's values, branch on a constant instead."
    )

    if examples:
        return f"{begin} ({why}). M{step}"
    return (
        f"{begin} ({why}). Give example_inputs, a tensor, a tuple or a dict of the arguments of {forward_text(model)}. With them, graphreg "
        "also tries torch.export, which can trace more than torch.fx (unless front_end='symbolic'). If the step branches on a shape, the "
        "trace takes the branch of the example_inputs, and the graph asserts that each call takes it. If this does not help, "
        f"m{step}"
    )


def location(error: BaseException) -> str:
    """Return the line of the user's code that raised an error, as ``" at file:line: code"``; ``""`` if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_of_a_library(f.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _is_of_a_library(file: str) -> bool:
    """Return whether a file belongs to torch, graphreg or Python's library, in whose folder there may be packages."""
    return file.startswith((*LIBRARY_FOLDERS, "<")) or (file.startswith(_PYTHONS) and "-packages" not in file)


def forward_text(model: nn.Module) -> str:
    """Return the arguments of a model's forward as text, for messages: ``forward(x, mask=None)``."""
    parameters = inspect.signature(model.forward).parameters.values()
    shown_ones = [str(p.replace(annotation=p.empty)) for p in parameters]
    more = [f"and {len(shown_ones) - _SHOWN} more"] if len(shown_ones) > _SHOWN else []
    return f"forward({', '.join([*shown_ones[:_SHOWN], *more])})"
