"""One model in a process of its own, which limits its memory itself and sends what came of it."""

from __future__ import annotations

import importlib
import os
import resource
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.columns import examine
from zoo.providers import one_line, provider
from zoo.subject import Subject


def run(sender: Connection, memory: int, module: str, source: str, name: str) -> None:
    """Send the record of a model, or the error that ended it; what libraries print goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what models say of themselves
    try:
        sender.send(record_of(module, source, name))
    except BaseException as error:
        sender.send({"error": f"its process ended: {one_line(error)}"})


def record_of(module: str, source: str, name: str) -> dict[str, Any]:
    try:
        model, inputs = provider(module, source).build(name)
    except Exception as error:
        return {"error": one_line(error)}
    shapes = ["x".join(map(str, x.shape)) or "number" for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    sampled = f"{source}/{name}" in importlib.import_module(module).INDUCTOR
    inners = ("aot_eager", "inductor") if sampled else ("aot_eager",)
    return {"inputs": list(dict.fromkeys(shapes))} | examine(Subject(model, inputs, inners))
