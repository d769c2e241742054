"""A tiny configuration of a transformers family, by rule: each field whose name says what it sizes becomes small.

Two rules are tried, ``SMALL`` and then ``SHALLOW``, which leaves widths alone, for families whose widths hang together in ways of
their own. Whether one fits is seen by building the model and running it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

Rule = tuple[tuple[str, Callable[[Any], Any]], ...]  # a pattern of whole field names, and what becomes of the value


def _at_most(limit: int) -> Callable[[Any], Any]:
    """Of a number at most ``limit``, of a list each entry."""
    return lambda value: type(value)(map(_at_most(limit), value)) if isinstance(value, (list, tuple)) else min(value, limit)


def _kinds(value: Any) -> Any:
    """Each kind of layer once, and two layers at least."""
    kinds = list(dict.fromkeys(value))
    return kinds if len(kinds) > 1 else kinds * 2


DEPTH: Rule = (
    (r"layer_types|layers_block_type|mlp_layer_types", _kinds),
    (r"(num_|n_)?((en|de)coder_|hidden_|local_|global_)*(layers?|blocks)|depths?|num_conv_blocks", _at_most(2)),
    (r"(\w+_)?vocab_size|n_vocab", _at_most(120)),
    (r"(\w+_)?(token_id|token_index|index_id)", lambda value: value % 100),
    (r"(\w+_)?(num_|n_)?(local_|routed_)?experts|n_routed_experts", _at_most(4)),
    (r"(\w+_)?(experts_per_tok|experts_per_token|topk|top_k_experts)", _at_most(2)),
    (r"n_group|topk_group", _at_most(1)),
    (r"image_size|(\w+_)?img_size", _at_most(64)),
    (r"max_source_positions|max_length", _at_most(64)),
)  # fmt: skip

WIDTHS: Rule = (
    (r"(\w+_)?(num_)?(key_value|kv)_heads", _at_most(2)),
    (r"mamba_n_heads", _at_most(8)),
    (r"mamba_d_head|mamba_d_state|(\w+_)?state_size", _at_most(8)),
    (r"(\w+_)?(num_|n_)?(attention_)?heads?|n_head", _at_most(4)),
    (r"head_dim|(qk_)?(rope|nope)?_?head_dim|attention_head_size|v_head_dim", _at_most(8)),
    (r"(\w+_)?(intermediate|inner)_(size|dim)|(\w+_)?ffn_(dim|hidden_size)|d_ff|n_inner", _at_most(64)),
    (r"(\w+_)?(hidden|embedding|embed|embd|proj|projection|model)_?(size|dim|sizes|dims)|d_model|dim", _at_most(32)),
    (r"n_embd|(q|kv)_lora_rank", _at_most(32)),
    (r"(\w+_)?(position_embeddings|positions)|n_ctx", _at_most(128)),
    (r"patch_size|rotary_dim", _at_most(8)),
)  # fmt: skip

SHALLOW: Rule = DEPTH
SMALL: Rule = (*DEPTH, *WIDTHS)


def tiny(kind: type[Any], rule: Rule) -> Any:
    """A configuration of ``kind`` with its fields made small by ``rule``, those of the configurations within it too."""
    default = kind()
    fields = inspect.signature(kind.__init__).parameters
    inner = {name: tiny(type(getattr(default, name)), rule) for name in kind.sub_configs if getattr(default, name, None) is not None}
    given = {name: made for name in fields if (made := _made(name, getattr(default, name, None), rule)) is not None}
    counts = {len(value) for name, value in given.items() if re.fullmatch(DEPTH[0][0], name)}
    if counts and "num_hidden_layers" in given:  # one kind a layer
        given["num_hidden_layers"] = counts.pop()
    return kind(**given | inner)


def _made(name: str, value: Any, rule: Rule) -> Any:
    """What becomes of a field: None for one that stays as it is."""
    change = next((change for pattern, change in rule if re.fullmatch(pattern, name)), None)
    if change is None or not (isinstance(value, list) and value if change is _kinds else _is_number(value)):
        return None
    return change(value)


def _is_number(value: Any) -> bool:
    """A whole number, or a list of such."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, int) and not isinstance(value, bool)


def sizes(config: Any) -> Mapping[str, Any]:
    """Every field of a configuration and those within it; the outermost counts."""
    found: dict[str, Any] = {}
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None:
            found = dict(sizes(getattr(config, name))) | found
    return found | {name: value for name, value in vars(config).items() if value is not None}
