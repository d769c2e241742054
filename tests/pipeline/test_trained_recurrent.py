"""A trained recurrent model that comes in a wheel: g2pM's, which tells how a Mandarin character is pronounced in its sentence.

g2pM (Park & Lee, Interspeech 2020) is a bidirectional LSTM, trained in torch; the wheel has its weights, with torch's names,
and runs them in NumPy, so that it says itself whether the model here is its own.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphreg

PENALTIES = {"recurrent_norm": 1e-2, "recurrent_state": 1e-2, "hidden_l1": 1e-2}  # by keyword, on the sequence of states
SENTENCES = ("他红了20年以后竟退出了大家的视线。", "银行行长在长江边重新发现了一行重要的数字。")


class Pronounces(nn.Module):
    def __init__(self, characters: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = nn.LSTM(64, 32, bidirectional=True, batch_first=True)
        self.logit_layer = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, characters: Tensor) -> Tensor:
        """characters: int64 [batch, time] -> logits [batch, time, classes]."""
        out, _ = self.lstm(self.embedding(characters))
        return self.logit_layer(out)


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings():  # its files are from the days of NumPy 1, and it leaves them open
        warnings.simplefilter("ignore")
        from g2pM import G2pM  # noqa: PLC0415

        return G2pM()


def trained(theirs: Any) -> Pronounces:
    names = {
        "embedding.weight": theirs.embeddings, "logit_layer.0.weight": theirs.hidden_weight_l0, "logit_layer.0.bias": theirs.hidden_bias_l0,
        "logit_layer.2.weight": theirs.hidden_weight_l1, "logit_layer.2.bias": theirs.hidden_bias_l1,
    }  # fmt: skip
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names |= {f"lstm.{kind}_l0": getattr(theirs, kind), f"lstm.{kind}_l0_reverse": getattr(theirs, f"{kind}_reverse")}
    model = Pronounces(len(theirs.embeddings), len(theirs.hidden_bias_l1))
    model.load_state_dict(OrderedDict((name, torch.from_numpy(value)) for name, value in names.items()))
    return model


def read(theirs: Any, sentence: str) -> Tensor:
    ids = [theirs.char2idx.get(character, theirs.char2idx["<UNK>"]) for character in sentence]
    return torch.tensor([[theirs.char2idx["시"], *ids, theirs.char2idx["끝"]]])


def test_the_model_is_the_wheels_own(theirs: Any) -> None:
    model = trained(theirs).eval()
    for sentence in SENTENCES:
        x = read(theirs, sentence)
        everywhere = np.arange(x.shape[1])
        assert model(x)[0].argmax(1).tolist() == theirs.predict(x.numpy(), everywhere).tolist()
    assert theirs("银行行长")[:2] == ["yin2", "hang2"]


def test_regularized_compiled_one_step_and_stripped(theirs: Any) -> None:
    model = trained(theirs)
    keys, x = list(model.state_dict()), read(theirs, SENTENCES[0])
    keywords = {name: {"weight": weight, "pattern": "lstm:out"} for name, weight in PENALTIES.items()}
    module = graphreg.regularize(model, compile={"backend": "aot_eager"}, **keywords)
    twin = copy.deepcopy(graphreg.regularize(model, **keywords))  # the same in eager, with weights of its own
    assert "lstm: LSTM, lowered to graphreg::recurrent when compiled" in graphreg.report(module).notes
    before, labels = model(x).detach(), torch.from_numpy(theirs.predict(x.numpy(), np.arange(x.shape[1])))
    for each in (module, twin):
        output, penalties = each(x)
        assert list(penalties) == list(PENALTIES) and all(value > 0 for value in penalties.values())
        (nn.functional.cross_entropy(output[0], labels) + sum(penalties.values())).backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for (name, ours), own in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, own.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        assert name == "embedding.weight" or ours.grad.abs().sum() > 0  # type: ignore[union-attr]
        torch.testing.assert_close(ours, own)
    stripped = graphreg.strip(module)
    assert not torch.equal(model(x), before)  # it has learned something
    assert torch.equal(stripped.eval()(x), model.eval()(x))
    assert list(stripped.state_dict()) == list(module.state_dict()) == list(model.state_dict()) == keys
    assert all(ours is own for ours, own in zip(stripped.parameters(), model.parameters(), strict=True))
