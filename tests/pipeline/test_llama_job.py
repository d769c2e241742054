"""A language model as it is fine-tuned: LoRA, NEFTune, z-loss, head dropout, hooks on its layers, ``generate``; eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

import graphreg  # noqa: E402
from graphreg.errors import GraphRegError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
REGULARIZERS: dict[str, Any] = {
    "neftune": {"weight": 5.0, "lengths": "attention_mask"}, "z_loss": {"weight": 1e-2, "lengths": "attention_mask"},
    "head_dropout": 0.1, "weight_l2": {"weight": 1e-2, "pattern": "**lora_*", "reduction": "sum"},
}  # fmt: skip


def adapted() -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_the_job() -> None:
    torch._dynamo.reset()
    plain, model = adapted(), adapted()
    inner = model.base_model.model
    graphreg.regularize_(inner, **REGULARIZERS, penalties="attach", scale=1, rng=0, blocks="model.layers.*")
    seen: list[Any] = []
    for each in (plain, model):
        each.base_model.model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append((args, output)))
    losses = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        graphreg.set_rng_state(inner, {**graphreg.rng_state(inner), "call": 0})
        loss = call(**BATCH).loss
        loss.backward()
        losses.append(loss.detach())
        assert all(("lora_" in name) == (each.grad is not None) for name, each in model.named_parameters())
    torch.testing.assert_close(losses[0], losses[1])
    with graphreg.noise_off(inner), graphreg.penalties_off(inner):
        quiet = model(**BATCH).loss
    torch.testing.assert_close(quiet, plain(**BATCH).loss)
    assert not torch.allclose(quiet.detach(), losses[0])
    (args, output), (plain_args, plain_output) = seen[-2:]
    torch.testing.assert_close((args, output), (plain_args, plain_output))
    prompt = {"input_ids": IDS[:, :4], "attention_mask": MASK[:, :4], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.eval().generate(**prompt), plain.eval().generate(**prompt))
    inner.model.layers[0].register_forward_hook(lambda layer, args, kwargs, output: None, with_kwargs=True)
    with pytest.raises(GraphRegError, match="a hook on the block 'model.layers.0' would get a DynamicCache"):
        model.train()(**BATCH)
    torch._dynamo.reset()
