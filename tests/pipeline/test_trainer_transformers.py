"""The Trainer of transformers trains a rewritten model whose penalties are attached, in code that knows nothing of graphreg."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.runtime.rewritten_module import RewrittenModule

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate: pip install 'graphreg[trainers]'")
transformers = pytest.importorskip("transformers")
from transformers.trainer_callback import TrainerCallback  # noqa: E402

from language_models import WORDS, batch  # noqa: E402
from pages import run_page  # noqa: E402
from tied_words import tied_words  # noqa: E402

SETTINGS: dict[str, Any] = {"hidden_dropout": 0.2, "weight_l2": 3.0, "hidden_l1": {"weight": 2.0, "pattern": "*mlp"}}
SENTENCES = [{name: torch.arange(5) + 3 + i % 4 for name in ("input_ids", "labels")} for i in range(12)]  # each word is one more


class Watch(TrainerCallback):
    """What a step saw: torch's generator before it, and the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, **more: Any) -> None:
        self.before.append(torch.get_rng_state())

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **more: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=WORDS, n_positions=8, bos_token_id=1, eos_token_id=2)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


Pair = Callable[[], tuple[RewrittenModule, RewrittenModule]]


@pytest.fixture(scope="session", params=[tied_words, pytest.param(gpt2, marks=pytest.mark.sweep)])
def pair(request: pytest.FixtureRequest) -> Pair:
    """One model with its penalties attached, and the same with them returned, of the same noise."""
    traced = graphreg.trace(request.param(), batch(2, 5))
    plan = graphreg.plan(traced, graphreg.from_kwargs(traced, **SETTINGS))
    made = [graphreg.rewrite(traced, plan, rng=0, penalties=penalties) for penalties in ("attach", "return")]
    return lambda: (copy.deepcopy(made[0]), copy.deepcopy(made[1]))


def trainer(module: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    """As a user writes it."""
    arguments = transformers.TrainingArguments(
        str(folder), **{"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no", "max_grad_norm": 0,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, **options},
    )  # fmt: skip
    given = {"train_dataset": SENTENCES, "eval_dataset": SENTENCES[:5], "data_collator": Collator()}
    return transformers.Trainer(module, arguments, callbacks=list(callbacks), **given)


class Collator:
    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return self.batches[-1]


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("parts", [1, 3])
def test_the_first_gradient_by_hand(pair: Pair, tmp_path: Path, parts: int) -> None:
    """A step of one batch, and one accumulated over three: the penalties of each batch are divided as its loss is."""
    attached, returned = pair()
    watch = Watch()
    made = trainer(attached, tmp_path, watch, gradient_accumulation_steps=parts, max_steps=1)
    made.train()
    torch.set_rng_state(watch.before[0])  # the model's own dropout draws from torch's generator
    for data in made.data_collator.batches[:parts]:
        output, penalties = returned.train()(**data)
        squares = [p.square().mean() for p in returned.parameters() if p.dim() > 1]
        torch.testing.assert_close(penalties["weight_l2"], 3 * torch.stack(squares).mean())
        ((output.loss + penalties["weight_l2"] + penalties["hidden_l1"]) / parts).backward()
    expected = {name: p.grad for name, p in returned.named_parameters()}
    assert expected.keys() == watch.gradients[0].keys()
    torch.testing.assert_close(watch.gradients[0], expected)


def test_it_learns_and_evaluates_without_noise(pair: Pair, tmp_path: Path) -> None:
    attached, _ = pair()
    made = trainer(attached, tmp_path, max_steps=8, learning_rate=3e-2)
    made.train()
    found = losses(made)
    assert found[-1] < found[0] - 0.5
    noise = graphreg.rng_state(attached)
    first, second = (made.evaluate()["eval_loss"] for _ in range(2))
    plain = graphreg.strip(attached).eval()
    with torch.no_grad():
        expected = plain(**Collator()(SENTENCES[:5])).loss + sum(attached.penalties().values())
    assert first == second and graphreg.rng_state(attached) == noise
    assert first == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture(scope="session")
def page() -> dict[str, Any]:
    """The names of docs/trainers.md, whose code is run whole, in passing."""
    return run_page("trainers.md", "transformers, with a separate module")


@pytest.fixture(scope="session")
def whole(pair: Pair, page: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[float]]]:
    """Four steps in a row, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("whole")
    attached, _ = pair()
    attached.register_state_dict_post_hook(page["untied"])
    made = trainer(attached, folder, page["NoiseState"](), save_strategy="steps", save_steps=2)
    made.train()
    yield folder / "checkpoint-2", losses(made)


def test_resumed_from_a_checkpoint_of_the_trainers(
    pair: Pair, page: dict[str, Any], whole: tuple[Path, list[float]], tmp_path: Path
) -> None:
    checkpoint, expected = whole
    found = {}
    for name, callbacks in {"with": [page["NoiseState"]()], "without": []}.items():
        attached, _ = pair()
        made = trainer(attached, tmp_path, *callbacks)
        made.train(resume_from_checkpoint=str(checkpoint))
        found[name] = losses(made)
    assert found["with"] == expected  # the first two are the checkpoint's
    assert found["without"][:2] == expected[:2] and found["without"][2:] != expected[2:]


def test_a_checkpoint_has_the_models_own_keys(pair: Pair, whole: tuple[Path, list[float]]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    saved = safetensors.load_file(whole[0] / "model.safetensors")
    (read,) = {"embed.weight", "transformer.wte.weight"} & set(saved)
    assert sorted(saved) == sorted(pair()[0].state_dict()) and torch.equal(saved["lm_head.weight"], saved[read])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks it of transformers
def test_adapters_of_peft(tmp_path: Path) -> None:
    """The model with adapters in it, rewritten: they alone train, and are what is decayed."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    decay = {"weight": 1.0, "pattern": "**lora_*", "reduction": "sum"}
    module = graphreg.regularize(adapted.base_model.model, example_inputs=batch(2, 5), penalties="attach", weight_l2=decay)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    watch = Watch()
    made = trainer(module, tmp_path, watch, max_steps=2)
    made.train()
    after, first = module.state_dict(), watch.gradients[0]
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(first) == {n for n in after if "lora_" in n}
    (a,) = (name for name in first if "lora_A" in name)  # its factor B is 0 at first, so that of the loss A has no gradient
    torch.testing.assert_close(first[a], 2 * before[a])
