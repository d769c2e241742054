"""Example inputs of a command: shapes with dtypes, or a file of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphreg.cli_errors import UsageError, raised
from graphreg.errors import near_sentence

GRAMMAR = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<bound>\d+))?")
BELOW = 2  # integers are 0 or 1 where no bound is given: indices of any table, and masks
EXAMPLE = "write [name=]SHAPE[:dtype][<bound], e.g. 1x3x224x224, 8x16:float64, 'input_ids=1x16:int64<100'"
KINDS = re.compile(r"bool|bfloat16|float(16|32|64)|complex(64|128)|int(8|16|32|64)|uint8")
DTYPES: dict[str, torch.dtype] = {name: value for name, value in vars(torch).items() if KINDS.fullmatch(name)}


def example_inputs(texts: Sequence[str] | None, file: str | None) -> Any:
    """What ``trace`` takes: a tuple of tensors, a dict where they are named, what a file holds, or None."""
    if texts and file is not None:
        raise UsageError("--input and --inputs are both given; one is enough.")
    if file is not None:
        return _read(file)
    if not texts:
        return None
    draws = torch.Generator().manual_seed(0)
    made = [_tensor(text, draws) for text in texts]
    names = [name for name, _ in made if name is not None]
    if not names:
        return tuple(tensor for _, tensor in made)
    if len(names) < len(made):
        raise UsageError(f"some inputs have a name and some have none ({', '.join(texts)}); name all of them, or none.")
    if len(set(names)) < len(names):
        raise UsageError(f"an input is given twice ({', '.join(texts)}); give each once.")
    return dict(zip(names, (tensor for _, tensor in made), strict=True))


def _tensor(text: str, draws: torch.Generator) -> tuple[str | None, Tensor]:
    found = GRAMMAR.fullmatch(text)
    if found is None:
        raise UsageError(f"--input {text!r} is no shape; {EXAMPLE}.")
    name, dtype_name, bound = found["name"], found["dtype"] or "float32", found["bound"]
    if dtype_name not in DTYPES:
        raise UsageError(f"--input {text!r}: there is no dtype {dtype_name}.{near_sentence(dtype_name, DTYPES)} All: {', '.join(DTYPES)}.")
    dtype, shape = DTYPES[dtype_name], tuple(map(int, found["shape"].split("x")))
    integers = not dtype.is_floating_point and not dtype.is_complex
    if bound is not None and not integers:
        raise UsageError(f"--input {text!r}: a bound is for integers, and {dtype_name} is none. Leave it out, or write :int64<{bound}.")
    largest = 2 if dtype is torch.bool else torch.iinfo(dtype).max if integers else 0
    if bound is not None and not 0 < int(bound) <= largest:
        raise UsageError(f"--input {text!r}: the bound of {dtype_name} is from 1 to {largest}.")
    try:
        if integers:
            return name, torch.randint(BELOW if bound is None else int(bound), shape, generator=draws).to(dtype)
        return name, torch.randn(shape, dtype=dtype, generator=draws)
    except (RuntimeError, TypeError) as error:  # more than there is memory for, or than an index can count
        raise UsageError(f"--input {text!r} cannot be made: {raised(error)}") from error


def _read(file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--inputs: there is no file {file}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load tells a damaged file by errors of many kinds
        raise UsageError(
            f"--inputs {file} cannot be read; write it with torch.save, of tensors in a tuple or a dict ({raised(error)})"
        ) from error
    if isinstance(found, dict) and not all(isinstance(key, str) for key in found):
        raise UsageError(f"--inputs {file} holds a dict whose keys are no names of arguments.")
    return tuple(found) if isinstance(found, list) else found
