"""One model in a process of its own: ``python -m zoo.one BYTES MODULE PROVIDER NAME`` prints what came of it, as JSON.

It limits its memory itself: what ran between fork and exec (``preexec_fn``) sometimes crashed where the parent had many threads.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import warnings

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.columns import examine
from zoo.providers import one_line, provider
from zoo.subject import Subject


def main(memory: str, module: str, source: str, name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what models say of themselves
    try:
        model, inputs = provider(module, source).build(name)
    except Exception as error:
        print(json.dumps({"error": one_line(error)}))
        return
    shapes = ["x".join(map(str, x.shape)) or "number" for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    sampled = f"{source}/{name}" in importlib.import_module(module).INDUCTOR
    inners = ("aot_eager", "inductor") if sampled else ("aot_eager",)
    print(json.dumps({"inputs": list(dict.fromkeys(shapes))} | examine(Subject(model, inputs, inners))))


if __name__ == "__main__":
    main(*sys.argv[1:])
