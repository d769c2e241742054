"""Key-value caches of transformers: in train mode a call returns the model's own output, with the cache that the model fills."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import graphreg  # noqa: E402
from graphreg import TraceError  # noqa: E402
from graphreg.tracing.proof.values import difference, leaves_with_places  # noqa: E402

WORDS: dict[str, Any] = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
KINDS: dict[str, Any] = {
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "MistralForCausalLM": SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 1, "sliding_window": 3, "max_position_embeddings": 16},
}


def ids(words: int) -> torch.Tensor:
    return torch.randint(3, 20, (2, words), generator=torch.Generator().manual_seed(words))


def made(kind: str) -> Any:
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return cls(cls.config_class(**WORDS, **KINDS[kind])).train()


def assert_same(one: Any, other: Any) -> None:
    ours, theirs = dict(leaves_with_places(one, "output")), dict(leaves_with_places(other, "output"))
    assert list(ours) == list(theirs)
    assert not [place for place, value in theirs.items() if difference(value, ours[place])]


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_models(kind: str) -> None:
    """As a dict and as a tuple, by ``regularize`` and in place, with other sizes; a next call goes on from the cache."""
    model = made(kind)
    plain, placed = copy.deepcopy(model), copy.deepcopy(model)
    graphreg.regularize_(placed, hidden_l2=0.1, penalties="attach", scale=1)
    module = graphreg.regularize(model, hidden_l2=0.1, example_inputs={"input_ids": ids(5)})
    calls: list[dict[str, Any]] = [{}, {"input_ids": ids(4)}, {"return_dict": False}, {"use_cache": True}]
    for call in ({"input_ids": ids(5)} | more for more in calls):
        outputs = list[Any]()
        for each in (plain, placed, module) if len(call) == 1 else (plain, placed):
            torch.manual_seed(1)
            outputs.append(each(**call))
        assert_same(outputs[1], outputs[0])
        if len(call) == 1:
            assert_same(outputs[2].output, outputs[0])
            assert list(outputs[0]) == ["logits", "cache"] and len(outputs[1].cache.layers) == model.config.num_hidden_layers
    stripped, last = graphreg.strip(module).eval(), torch.tensor([[4], [5]])
    assert torch.equal(plain.eval()(last, cache=stripped(ids(5)).cache).logits, plain(last, cache=plain(ids(5)).cache).logits)


def test_a_cache_of_the_callers_is_refused() -> None:
    """And is not touched."""
    model, cache = made("GPT2LMHeadModel"), transformers.DynamicCache()
    with pytest.raises(TraceError, match="the call carries a DynamicCache"):
        graphreg.regularize(model, hidden_l2=0.1, example_inputs={"input_ids": ids(5), "cache": cache})
    graphreg.regularize_(model, hidden_l2=0.1, penalties="attach", scale=1)
    with pytest.raises(TraceError, match=r"the call carries a DynamicCache.* call model\.eval\(\) first"):
        model(ids(5), cache=cache)
    assert cache.layers == []
    assert model.eval()(ids(5), cache=cache).cache is cache


@dataclass
class Cache:
    keys: Tensor


class TakesItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y: Tensor = self.layer(x) + cache.keys
        return y


def test_a_class_of_that_name_of_the_users_is_no_cache_of_transformers() -> None:
    plain, given = TakesItsOwn(), {"x": torch.ones(2, 4), "cache": Cache(torch.ones(4))}
    module = graphreg.regularize(plain, weight_l2=0.1, example_inputs=given)
    assert torch.equal(module(**given).output, plain(**given))
