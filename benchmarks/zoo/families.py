"""The families of transformers: one model of each, with a tiny configuration and random weights, and its inputs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from zoo.providers import Provider, call, one_line, tensors, try_out
from zoo.tiny import SHALLOW, SMALL, Rule, sizes, tiny

WORDS = 12  # tokens of a text
SAMPLES = 3200  # of a sound
# The second text ends in padding. Of a mask of ones transformers makes none at all, unless it is traced, and then a causal one: aimv2,
# which does not say elsewhere that it is causal, gives something else under torch.export itself.
PADDED = torch.tensor([[1] * WORDS, [1] * (WORDS - 2) + [0] * 2])
COUNT = 30
LARGEST = 100e6  # parameters: a model that no rule makes smaller is not tiny
HERE = Path(__file__).parent

transformers.logging.set_verbosity_error()  # what it says of a configuration's missing weights


class Skipped(Exception):
    """A family that is not in the zoo; says why."""


def types() -> dict[str, list[str]]:
    """The folders of ``transformers.models``, in alphabetical order, each with the types of its models that ``AutoModel`` knows."""
    found: dict[str, list[str]] = {}
    for kind in sorted(MODEL_MAPPING_NAMES):
        if kind in CONFIG_MAPPING:
            found.setdefault(model_type_to_module_name(kind), []).append(kind)
    return dict(sorted(found.items()))


def taken() -> dict[str, str]:
    """The first ``COUNT`` families that can be had, each with its kind."""
    return survey()["taken"]


def skipped() -> dict[str, str]:
    """The families that stand before the last of these in the alphabet, and why they are not in the zoo."""
    return survey()["skipped"]


@cache
def survey() -> dict[str, dict[str, str]]:
    """Builds and runs one after the other until there are enough; kept for the version of transformers and the rules."""
    rules = sha256(b"".join(path.read_bytes() for path in (HERE / "tiny.py", HERE / "families.py"))).hexdigest()
    kept = HERE.parents[1] / "build" / "zoo" / f"families-{transformers.__version__}-{rules[:8]}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    found: dict[str, dict[str, str]] = {"taken": {}, "skipped": {}}
    for family in types():
        try:
            found["taken"][family] = kind_of(*build(family))
        except Skipped as reason:
            found["skipped"][family] = str(reason)
        if len(found["taken"]) == COUNT:
            break
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1))
    return found


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The first of the family's types that has a tiny configuration; Skipped where none has."""
    reasons: dict[str, str] = {}
    for kind in types()[family]:
        for rule in (SMALL, SHALLOW):
            try:
                return _build(kind, rule)
            except Exception as error:  # whatever a family has against a rule
                reasons[kind if rule is SMALL else f"{kind} with its widths kept"] = (
                    str(error) if isinstance(error, Skipped) else one_line(error)
                )
    raise Skipped("; ".join(f"{kind}: {reason}" for kind, reason in reasons.items()))


def _build(kind: str, rule: Rule) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = tiny(CONFIG_MAPPING[kind], rule)
    known = MODEL_MAPPING[type(config)]
    made: Any = known[0] if isinstance(known, tuple) else known
    with torch.device("meta"):
        count = sum(p.numel() for p in made(config).parameters())
    if count > LARGEST:
        raise Skipped(f"no rule makes it smaller than {count / 1e6:.0f} million parameters")
    model = made(config)
    error: Exception = Skipped("its forward takes no text, picture or sound")
    for inputs in attempts(model):
        try:
            try_out(model, inputs)
            return model.train(), inputs
        except Exception as raised:
            error = raised.with_traceback(None)
    raise error


def attempts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's main input alone, then all that its forward names."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    every = {name: value for name, value in candidates(sizes(config)).items() if name in accepted}
    if not config.is_encoder_decoder:
        every.pop("decoder_input_ids", None)
    main = str(getattr(model, "main_input_name", "input_ids"))
    beside = {"input_ids": ("attention_mask",)}.get(main, ()) + ("decoder_input_ids",)
    if main in every:
        yield {name: every[name] for name in (main, *beside) if name in every}
    if every:
        yield every


def candidates(size: Mapping[str, Any]) -> dict[str, Tensor]:
    """A text, a picture and a sound of the sizes that a configuration names."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, int(size.get("vocab_size", 100)), (2, WORDS), generator=draw)
    image = size.get("image_size", 64)
    height, width = image if isinstance(image, (list, tuple)) else (image, image)
    bins, frames = int(size.get("num_mel_bins", 80)), int(size.get("max_length", 0) or 2 * size.get("max_source_positions", 32))
    spectrum = (2, frames, bins) if "max_length" in size else (2, bins, frames)
    sound = (2, frames, bins) if {"num_mel_bins", "max_length"} <= set(size) else (2, SAMPLES)
    return {
        "input_ids": ids,
        "attention_mask": PADDED,
        "decoder_input_ids": ids.flip(0),
        "pixel_values": torch.randn(2, int(size.get("num_channels", 3)), height, width, generator=draw),
        "input_values": torch.randn(*sound, generator=draw),
        "input_features": torch.randn(*spectrum, generator=draw),
    }


def kind_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """What it reads; of texts alone encoder, decoder or both; and whether it has experts."""
    config: Any = model.config
    reads = {"input_ids": "text", "pixel_values": "vision", "input_values": "audio", "input_features": "audio"}
    kinds = dict.fromkeys(kind for name, kind in reads.items() if name in inputs)
    parts = " and ".join(kinds)
    if parts == "text":
        parts = "encoder-decoder" if config.is_encoder_decoder else "decoder" if causal(model, inputs) else "encoder"
    experts = any("experts" in name and isinstance(value, int) and value > 1 for name, value in sizes(config).items())
    return f"{parts}, mixture of experts" if experts else parts


def causal(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether another last word leaves what stands at the first as it was."""
    other = inputs["input_ids"].clone()
    other[:, -1] = 3 + (other[:, -1] - 2) % 20
    with torch.no_grad():
        first, second = (tensors(call(model.eval(), dict(inputs) | {"input_ids": ids}))[0] for ids in (inputs["input_ids"], other))
    return torch.allclose(first[:, 0], second[:, 0], atol=1e-5)


PROVIDER = Provider(taken, build, skipped)
