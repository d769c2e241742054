"""The time in which models of transformers are traced and regularized, in units of one static ``torch.export`` of the same model.

``regularize``: with example inputs, both modes and the proof included. ``in place``: the first training call, its own step included.
"""

from __future__ import annotations

import gc
import inspect
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from page import arguments, chosen, progress, row
from torch import Tensor, nn

import graphreg

SMALL: dict[str, Any] = {
    "num_hidden_layers": 12, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 100,
}  # fmt: skip
IMAGE: dict[str, Any] = {"image_size": 32, "num_labels": 4}
REGULARIZERS: dict[str, Any] = {"hidden_dropout": 0.1, "weight_l2": 1e-4, "rng": 0}


def ids(length: int = 9) -> Tensor:
    return torch.randint(5, 90, (2, length))


def words() -> dict[str, Any]:
    return {"input_ids": ids()}


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def llama(layers: int) -> nn.Module:
    options = {**SMALL, "num_hidden_layers": layers, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_layer": 12, "n_head": 4, "n_embd": 32, "vocab_size": 100, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**IMAGE, **sizes))


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 12, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=100, **sizes))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=2))


def vit() -> nn.Module:
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, **sizes, patch_size=8))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "BERT": (bert, words), "GPT-2": (gpt2, words), "Llama": (lambda: llama(12), words), "Qwen2": (qwen2, words),
    "ViT": (vit, images), "Swin, two blocks": (swin, images), "T5": (t5, lambda: {**words(), "decoder_input_ids": ids(7)}),
}  # fmt: skip


def exported(make: Callable[[], nn.Module], inputs: dict[str, Any]) -> Callable[[], object]:
    model = make().train()
    # torch.export cannot return a cache
    without = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return lambda: torch.export.export(model, (), inputs | without, strict=False)


def regularized(make: Callable[[], nn.Module], inputs: dict[str, Any], **more: Any) -> Callable[[], object]:
    model = make().train()
    return lambda: graphreg.regularize(model, example_inputs=inputs, **REGULARIZERS, **more)


def in_place(make: Callable[[], nn.Module], inputs: dict[str, Any]) -> Callable[[], object]:
    model = graphreg.regularize_(make().train(), penalties="attach", scale=1, **REGULARIZERS)
    return lambda: model(**inputs)


def seconds(run: Callable[[], object]) -> float:
    """Of the processor, so that what else the machine does is not counted."""
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    options = arguments(__doc__, ("--rounds", 3), names=MODELS)
    torch.set_num_threads(1)
    logging.getLogger("graphreg").setLevel(logging.ERROR)  # what it says of these strengths
    print(f"1 thread, {options.rounds} interleaved rounds after one that is not counted; medians, CPU time.\n")
    print(row("model", "one export, s", "`regularize`, s", "ratio", "in place, s", "ratio"))
    print(row(*["---"] * 6))
    for name, (make, given) in chosen(MODELS, options.only).items():
        progress(f"time to trace: {name}")
        inputs = given()
        ways = exported, regularized, in_place
        rounds = [[seconds(way(make, inputs)) for way in ways] for _ in range(options.rounds + 1)][1:]
        export, ours, placed = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(row(name, *(f"{each:.2f}" for each in (export, ours, ours / export, placed, placed / export))), flush=True)
    if options.only == ["*"]:
        depths = [min(seconds(regularized(lambda n=n: llama(n), words(), prove=False)) for _ in range(options.rounds)) for n in (2, 80)]
        print(f"\nLlama with 80 layers, without the proof: {depths[1]:.2f} s, {depths[1] / depths[0]:.1f} times the one with 2.")


if __name__ == "__main__":
    main()
