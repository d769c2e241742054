"""The Trainer of transformers trains a model that is regularized in place; a callback is all that knows of graphreg."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, RegularizerError, schedules

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate: pip install 'graphreg[trainers]'")
transformers = pytest.importorskip("transformers")
from graphreg.integrations.parts import Parts, tensors_apart  # noqa: E402
from graphreg.integrations.transformers import RegularizerCallback  # noqa: E402
from language_models import WORDS  # noqa: E402
from tied_words import tied_words  # noqa: E402

SETTINGS: dict[str, Any] = {"hidden_dropout": 0.2, "weight_l2": 3.0, "hidden_l1": 2.0, "rng": 0}
SCHEDULED: dict[str, Any] = {**SETTINGS, "hidden_dropout": schedules.linear(0.1, 0.5, 4), "hidden_l1": schedules.linear(2.0, 0.0, 3)}
SENTENCES = [{name: torch.arange(5) + 3 + i % 4 for name in ("input_ids", "labels")} for i in range(5)]
for index, short in enumerate(SENTENCES[:3]):  # other numbers of words to predict, so that a mean over words is none over batches
    short["labels"] = torch.where(torch.arange(5) < index, -100, short["labels"])


class Watch(transformers.TrainerCallback):
    """The gradients of each step, and what the checkpoint of a test needs beside."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **more: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Begun(transformers.TrainerCallback):
    """The state of the noise as the first step begins, and the number of batches for which penalties are scaled."""

    def on_step_begin(self, *args: Any, model: Any, **more: Any) -> None:
        self.state, self.batches = tensors_apart(Parts(model).state()), vars(model)["graphreg_in_place"].session.scale.batches


class Generates(transformers.TrainerCallback):
    """Generates words and saves the model after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.words = folder, list[Tensor]()

    def on_step_end(self, *args: Any, model: Any, **more: Any) -> None:
        model.eval()
        self.words.append(model.generate(SENTENCES[0]["input_ids"][None, :2], max_new_tokens=3, do_sample=False, pad_token_id=0))
        model.save_pretrained(self.folder)
        model.train()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=WORDS, n_positions=8, bos_token_id=1, eos_token_id=2,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Words(nn.Module):
    """Predicts each word from itself. As models of transformers do, it divides its loss by ``num_items_in_batch`` if it gets that."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hid, self.out = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.out(torch.relu(self.hid(self.embed(input_ids))))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        items = kwargs.get("num_items_in_batch")
        return {"loss": loss / ((labels != -100).sum() if items is None else items), "logits": logits}


def words() -> Words:
    torch.manual_seed(0)
    return Words()


def by_hand(module: Any, call: dict[str, Any], items: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, divided by ``items``, and the sum of its penalties."""
    output, penalties = module(input_ids=call["input_ids"], labels=call["labels"])
    logits = output["logits"].flatten(0, 1)
    return F.cross_entropy(logits, call["labels"].flatten(), reduction="sum") / items, sum(penalties.values())


def trainer(model: nn.Module, folder: Path, *callbacks: Any, kind: Any = transformers.Trainer, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), **{"per_device_train_batch_size": 1, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "max_grad_norm": 0,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, "dataloader_pin_memory": False, **options},
    )  # fmt: skip
    return kind(model, arguments, callbacks=list(callbacks), train_dataset=SENTENCES)


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Compare what ``tensors_apart`` returned, bit for bit."""
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


Whole = tuple[Callable[[], Any], Path, list[float], dict[str, Tensor]]


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


class Order(transformers.TrainerCallback):
    """The batches in the order in which the model saw them."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[dict[str, Any]] = []
        self.handle = model.register_forward_pre_hook(self.seen, with_kwargs=True)

    def seen(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.batches.append(dict(kwargs))


def test_penalties_count_once_when_the_loss_is_a_mean_over_all_words_of_a_step(tmp_path: Path) -> None:
    """Five batches, two in a step: the third step has one. Each step is compared with the sum by hand."""
    model, watch = graphreg.regularize_(words(), **SETTINGS), Watch()
    order = Order(model)
    made = trainer(model, tmp_path, watch, RegularizerCallback(), gradient_accumulation_steps=2, max_steps=3, learning_rate=0.0)
    made.train()
    order.handle.remove()
    assert [int(call["num_items_in_batch"]) for call in order.batches] != [5] * 5
    module = graphreg.regularize(words(), example_inputs={name: order.batches[0][name] for name in ("input_ids", "labels")}, **SETTINGS)
    for calls, found in zip(((0, 1), (2, 3), (4,)), watch.gradients, strict=True):
        module.zero_grad()
        for call in calls:
            loss, penalties = by_hand(module, order.batches[call], order.batches[call]["num_items_in_batch"])
            (loss + penalties / len(calls)).backward()
        torch.testing.assert_close(found, {name: p.grad for name, p in module.named_parameters()})
    assert vars(model)["graphreg_in_place"].session.scale is None  # as before


def test_without_num_items_in_batch_the_trainer_divides(tmp_path: Path) -> None:
    model, watch = words(), Watch()
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    graphreg.regularize_(model, **SETTINGS)
    order = Order(model)
    trainer(model, tmp_path, watch, RegularizerCallback(), gradient_accumulation_steps=2, max_steps=1).train()
    order.handle.remove()
    module = graphreg.regularize(words(), example_inputs=order.batches[0], **SETTINGS)
    for call in order.batches:
        loss, penalties = by_hand(module, call, (call["labels"] != -100).sum())
        ((loss + penalties) / 2).backward()
    torch.testing.assert_close(watch.gradients[0], {name: p.grad for name, p in module.named_parameters()})


class MeanWords(Words):
    """Takes ``num_items_in_batch``, as each model of transformers, and takes the mean over the batch, as its classifiers."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, labels)


class TupleWords(Words):
    """Returns its loss in a tuple, to which penalties cannot be added; with ``return_dict=False``, models of transformers do so."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return tuple(super().forward(input_ids, labels, **kwargs).values())


class MeanTupleWords(MeanWords):
    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return tuple(super().forward(input_ids, labels).values())


class DividesInPlace(Words):
    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        logits = self.out(torch.relu(self.hid(self.embed(input_ids))))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.div_(kwargs.get("num_items_in_batch", 5))
        return {"loss": loss, "logits": logits}


class TakesNoMore(Words):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return super().forward(input_ids, labels)


class Smooths(Words):
    """The Trainer takes the labels away, and computes a smooth loss itself."""

    config = transformers.PretrainedConfig()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return {"logits": self.out(torch.relu(self.hid(self.embed(input_ids))))}


@pytest.mark.parametrize(
    ("make", "batches"),
    [(Words, 2), (MeanWords, 3), (TupleWords, 3), (MeanTupleWords, 2), (DividesInPlace, 2), (TakesNoMore, 2), (Smooths, 2)],
)
def test_penalties_have_the_share_of_a_step_with_one_batch(make: Callable[[], nn.Module], batches: int, tmp_path: Path) -> None:
    """All batches are equal, so the step of k batches has the gradient of a step with one batch, or k times this gradient."""
    found = []
    for count in (1, batches):
        torch.manual_seed(0)
        model, watch = graphreg.regularize_(make(), weight_l2=30.0, hidden_l1=20.0), Watch()
        options = {"label_smoothing_factor": 0.1, "label_names": ["labels"]} if make is Smooths else {}
        made = trainer(model, tmp_path, watch, RegularizerCallback(), gradient_accumulation_steps=count, max_steps=1, **options)
        made.train_dataset = SENTENCES[-1:] * batches
        made.train()
        found.append(watch.gradients[0])
    factor = batches if make in (MeanWords, MeanTupleWords) else 1
    torch.testing.assert_close(found[1], {name: gradient * factor for name, gradient in found[0].items()})


class OwnLoss(transformers.Trainer):
    """Computes the loss from the logits, although the model returns one."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        labels = inputs["labels"] if self.args.label_names else inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(("kind", "keeps_labels"), [(OwnLoss, True), (OwnLoss, False), (transformers.Trainer, True)])
def test_a_loss_that_the_trainer_does_not_use(kind: Any, keeps_labels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties that are added to it train nothing. Without labels the model returns no loss, and they are joined to its logits."""
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: warnings.append(text))
    watch = Watch()
    for strength in (0.0, 30.0, 30.0):
        model = graphreg.regularize_(gpt2(), weight_l2=strength)
        options = {"label_names": ["labels"] if keeps_labels else [], "gradient_accumulation_steps": 2}
        trainer(model, tmp_path, watch, RegularizerCallback(), kind=kind, **options).train()
    found = [watch.gradients[0], watch.gradients[2]]
    reached = any(not torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert reached is not (kind is OwnLoss and keeps_labels)
    text = "no backward pass of this step went through this loss, so they train nothing"
    assert sum(text in warning for warning in warnings) == 2 * (not reached)  # once in each run


def test_penalties_of_a_classifier_of_transformers(tmp_path: Path) -> None:
    """It takes ``num_items_in_batch`` and does not divide by it. The attention mask of a tokenizer, int64, says which steps count."""
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    hidden = {"weight": 10.0, "pattern": "bert.encoder.layer.0.intermediate.intermediate_act_fn", "lengths": "attention_mask"}
    plain = transformers.BertForSequenceClassification(config)
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2={"weight": 20.0, "pattern": "classifier.*"}, hidden_l2=hidden)
    call = {"input_ids": SENTENCES[0]["input_ids"], "attention_mask": torch.tensor([1, 1, 1, 0, 0]), "labels": torch.tensor(1)}
    found = []
    for count in (1, 4):
        watch = Watch()
        made = trainer(model, tmp_path, watch, RegularizerCallback(), gradient_accumulation_steps=count, max_steps=1, learning_rate=0.0)
        made.train_dataset = [call] * 4
        made.train()
        found.append(watch.gradients[0])
    torch.testing.assert_close(found[1], {name: gradient * 4 for name, gradient in found[0].items()})
    seen: list[Tensor] = []
    plain.bert.encoder.layer[0].intermediate.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        plain(**{name: value[None] for name, value in call.items()})
    assert model.penalties()["hidden_l2"].item() == pytest.approx(10 * seen[0][:, :3].square().mean().item(), rel=1e-5)


@pytest.fixture(scope="module", params=[tied_words, pytest.param(gpt2, marks=pytest.mark.sweep)])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Four steps in a row, under schedules and a strength that was set, with a checkpoint after two, and generation and saving after each.

    GPT-2, each trace of which takes five seconds, is the sweep's, and test_trainers_page.py's.
    """
    folder, make = tmp_path_factory.mktemp("whole"), request.param
    model = graphreg.regularize_(make(), **SCHEDULED)
    graphreg.set_strength(model, "weight_l2", 2.0)
    generates = Generates(folder / "saved")
    made = trainer(model, folder, RegularizerCallback(), generates, save_strategy="steps", save_steps=2, max_steps=4)
    made.train()
    loaded = type(model).from_pretrained(folder / "saved")
    assert type(loaded).__bases__ == type(make()).__bases__ and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.generate(SENTENCES[0]["input_ids"][None, :2], max_new_tokens=3, do_sample=False, pad_token_id=0),
                       generates.words[-1])  # fmt: skip
    return make, folder / "checkpoint-2", losses(made), {name: p.detach().clone() for name, p in model.named_parameters()}


def test_resumed_bit_for_bit(whole: Whole, tmp_path: Path) -> None:
    """Noise, strengths, the count of schedules and tied weights come from the checkpoint. Nothing is generated in between."""
    make, checkpoint, expected, parameters = whole
    safetensors = pytest.importorskip("safetensors.torch")
    assert "lm_head.weight" not in safetensors.load_file(checkpoint / "model.safetensors")
    model = graphreg.regularize_(make(), **{**SCHEDULED, "rng": 5})
    made = trainer(model, tmp_path, RegularizerCallback(), max_steps=4)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert losses(made) == expected
    assert graphreg.strengths(model) == {"hidden_dropout": 0.5, "weight_l2": 2.0, "hidden_l1": 0.0}
    assert graphreg.rng_state(model)["clock"] == 4
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    again = graphreg.regularize_(make(), recipe=checkpoint / "graphreg_recipe.json")  # as the one that was saved
    assert graphreg.recipe(again) == {**graphreg.recipe(model), "rng": SETTINGS["rng"]}


class Killed(transformers.TrainerCallback):
    """Ends the run in the middle of a step."""

    def on_substep_end(self, args: Any, state: Any, *more: Any, **others: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_what_regularizers_keep_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Tensors lie in the folder of each checkpoint, go with it, and come back if it was moved."""
    keeping: dict[str, Any] = {**SCHEDULED, "l2_sp": 5.0, "spectral": {"weight": 3.0, "iterations": 2}, "hidden_l1": 0}
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "gradient_accumulation_steps": 2}

    def made(folder: Path, *callbacks: Any, **more: Any) -> tuple[Any, Any]:
        model = graphreg.regularize_(tied_words(), **keeping)
        return model, trainer(model, folder, RegularizerCallback("relu"), *callbacks, **{**options, "max_steps": 5, **more})

    whole, expected = made(tmp_path / "whole")
    expected.train()
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", Killed())[1].train()
    assert {each.name for each in (tmp_path / "killed").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert all(len([*each.glob("graphreg_state.*.pt")]) == 1 for each in (tmp_path / "killed").iterdir())
    model, resumed = made(tmp_path / "killed", restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    moved = shutil.move(tmp_path / "killed" / "checkpoint-4", tmp_path / "moved")  # four steps, of which the last was resumed
    with pytest.raises(GraphRegError, match=r"^graphreg_state.*\.pt of the checkpoint is missing: .* say where it is: Tr"):
        made(tmp_path / "other")[1].train(resume_from_checkpoint=str(moved))
    twin, again = made(tmp_path / "other", resume_from_checkpoint=str(moved))
    again.train(resume_from_checkpoint=str(moved))
    for found, other in ((model, resumed), (twin, again)):
        assert losses(other) == losses(expected) and len(set(losses(other))) == 5
        assert other.state.log_history[-2]["penalty/l2_sp"] > 0
        torch.testing.assert_close(found.state_dict(), whole.state_dict(), rtol=0, atol=0)
        assert_same(tensors_apart(Parts(found).state()), tensors_apart(Parts(whole).state()))
    assert "kept/relu/hidden_dropout" in resumed.state.log_history[-2]  # the Trainer has made the callback anew, for what it watches


def test_a_run_after_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    """The model is the same object: its noise and what regularizers keep are those of now, and the scale is that of the new run."""
    model = graphreg.regularize_(words(), weight_l2=3.0, spectral=1.0, hidden_dropout=0.2, rng=0)
    made = trainer(model, tmp_path, RegularizerCallback(), Killed(), gradient_accumulation_steps=3, max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    before = tensors_apart(Parts(model).state())
    made.remove_callback(Killed)
    for again, begun in ((trainer(model, tmp_path, RegularizerCallback()), 1), (made, 3)):
        watch = Begun()
        again.add_callback(watch)
        again.args.max_steps = 1
        again.train()
        assert_same(watch.state, before)
        before = tensors_apart(Parts(model).state())
        assert vars(model)["graphreg_in_place"].session.scale is None and watch.batches == begun


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path: Path) -> None:
    trainer(words(), tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(GraphRegError, match="^the checkpoint was saved without RegularizerCallback, so the Trainer cannot resume from it"):
        made = trainer(graphreg.regularize_(words(), **SETTINGS), tmp_path, RegularizerCallback(), max_steps=2)
        made.train(resume_from_checkpoint=True)


def test_logs(tmp_path: Path) -> None:
    model = graphreg.regularize_(words(), **SETTINGS)
    made = trainer(model, tmp_path, RegularizerCallback(watch="relu"), max_steps=3)
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert logs[2]["penalty/weight_l2"] == float(model.penalties()["weight_l2"]) > 0  # type: ignore[operator]
    assert logs[0]["strength/hidden_dropout"] == 0.2 and math.isfinite(logs[1]["penalty/hidden_l1"])
    kept = {name: value for name, value in logs[2].items() if name.startswith("kept/")}
    assert list(kept) == ["kept/relu/hidden_dropout"] and all(0.5 < value < 1 for value in kept.values())


def test_another_model_is_refused(whole: Whole, tmp_path: Path) -> None:
    make, checkpoint = whole[:2]
    other = graphreg.regularize_(make(), hidden_dropout=0.1)
    with pytest.raises(RegularizerError, match="only the model has a regularizer named hidden_l1, weight_l2. Regularize the model as"):
        trainer(other, tmp_path, RegularizerCallback(), max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(GraphRegError, match="no module in this Words is regularized, so there is nothing to save or to log"):
        trainer(words(), tmp_path, RegularizerCallback()).train()


def test_a_scale_of_the_users_stays(tmp_path: Path) -> None:
    model = graphreg.regularize_(words(), weight_l2=3.0, scale=0.5)
    order = Order(model)
    made = trainer(model, tmp_path, RegularizerCallback(), max_steps=1, learning_rate=0.0)
    made.train()
    order.handle.remove()
    plain = words()(**order.batches[0])["loss"].detach() + model.penalties()["weight_l2"] / 2  # type: ignore[operator]
    assert losses(made)[0] == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)])
def test_torch_compile(tmp_path: Path, backend: str) -> None:
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch.compiler.reset()
        model = graphreg.regularize_(words(), **SETTINGS)
        made = trainer(model, tmp_path, RegularizerCallback(), gradient_accumulation_steps=2, **options)
        made.train()
        found.append(losses(made))
        assert graphreg.rng_state(model)["call"] == 4
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        model, watch = graphreg.regularize_(gpt2(), **SETTINGS), Watch()
        trainer(model, tmp_path, watch, RegularizerCallback(), activation_checkpointing=on).train()
        blocks = "1 block: transformer.h.0; these checkpoint their own forward: transformer.h.0"
        assert (blocks in str(graphreg.report(model, cost=False))) == on
        found.append(watch.gradients)
    assert len(found[0]) == 2
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks it of transformers
def test_adapters_of_peft(tmp_path: Path) -> None:
    """The model inside the adapters is regularized in place, and the Trainer trains the adapters."""
    import peft  # noqa: PLC0415  (it takes seconds)

    config = peft.LoraConfig(r=2, target_modules=["mlp"], init_lora_weights=False)
    adapted = peft.get_peft_model(tied_words(), config)
    twin, options = copy.deepcopy(adapted).train(), {**SCHEDULED, "own_dropout": "seeded"}
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    inner = graphreg.regularize_(adapted.base_model.model, **options)
    watch, order = Watch(), Order(inner)
    made = trainer(adapted, tmp_path, watch, RegularizerCallback(), gradient_accumulation_steps=2, max_steps=2, learning_rate=0.1)
    made.train()
    order.handle.remove()
    given = {name: order.batches[0][name] for name in ("input_ids", "labels")}
    module = graphreg.regularize(twin.base_model.model, example_inputs=given, **options)
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert len(trained) == 2 and all("lora_" in name for name in trained)
    for call in order.batches[:2]:
        loss, penalties = by_hand(module, call, call["num_items_in_batch"])
        (loss + penalties / 2).backward()
    torch.testing.assert_close(watch.gradients[0], {name: p.grad for name, p in trained.items()})
    assert {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])} == set(trained)
    assert graphreg.rng_state(inner)["call"] == graphreg.rng_state(inner)["clock"] == 4
    adapted.save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(tied_words(), tmp_path / "saved")
    x = SENTENCES[0]["input_ids"][None]
    assert torch.equal(loaded.eval()(input_ids=x).logits, adapted.eval()(input_ids=x).logits)


def test_groups_resume_by_name(tmp_path: Path) -> None:
    """An optimizer of ``param_groups``, whose parameters are in another order when the run resumes; the scheduler goes by position."""

    def made(reverse: bool) -> Any:
        model = graphreg.regularize_(words(), **SETTINGS)
        groups = graphreg.param_groups(model, {"**@Linear": {"lr": 0.03}}, default={"lr": 0.01, "weight_decay": 0.1}, decay="standard")
        for group in groups if reverse else ():
            group.update({name: group[name][::-1] for name in ("params", "param_names")})
        optimizer = torch.optim.AdamW(groups)
        graphreg.load_by_name(optimizer)
        run = trainer(model, tmp_path, RegularizerCallback(), max_steps=4, save_steps=2, save_strategy="steps")
        return transformers.Trainer(
            model, run.args, callbacks=[RegularizerCallback()], train_dataset=SENTENCES, optimizers=(optimizer, None)
        )

    whole, again = made(False), made(True)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.0, 0.1, 0.0]
