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

from zoo.columns import examine, one_line
from zoo.subject import Subject


def main(memory: str, module: str, provider: str, name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what models say of themselves
    try:
        model, inputs = importlib.import_module(module).PROVIDERS[provider].build(name)
    except Exception as error:
        print(json.dumps({"error": one_line(error)}))
        return
    shapes = ["x".join(map(str, x.shape)) for x in inputs]
    print(json.dumps({"inputs": shapes} | examine(Subject(model, inputs))))


if __name__ == "__main__":
    main(*sys.argv[1:])
