"""``nn.Transformer`` and its parts, and recurrent models: torch's own layers in the forms that people write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.providers import Inputs, Provider, numbers

WIDTH, CLASSES, STEPS = 16, 5, 6


class Translator(nn.Module):
    """``nn.Transformer`` between two embeddings and a head, with the causal mask of its decoder."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, WIDTH)
        self.core = nn.Transformer(WIDTH, 4, 2, 2, 32, **options)
        self.head, self.axis = nn.Linear(WIDTH, 30), 1 if options.get("batch_first") else 0

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[self.axis])
        hidden: Tensor = self.core(self.embed(source), self.embed(target), tgt_mask=mask)
        return self.head(hidden)


class Stack(nn.Module):
    """``nn.TransformerEncoder`` under a classifier."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True, **options)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class Padded(Stack):
    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(dim=1))


class Decoder(nn.Module):
    """``nn.TransformerDecoder`` over a memory, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, 32, batch_first=True), 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(target, memory))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with its weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x)
        return self.head(torch.relu(self.norm(x + out))), weights


class Tagger(nn.Module):
    """A recurrent layer and a head at each step."""

    def __init__(self, layer: nn.RNNBase, features: int = WIDTH) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Packed(Tagger):
    """Sequences of unequal length: how many run at each step is read from the lengths, which are data."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Unrolled(nn.Module):
    """A cell in a loop over the steps of its input."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state, steps = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(steps, dim=1))


class Pair(nn.Module):
    """An LSTM that reads and one that writes, with attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.reader(source)
        written, _ = self.writer(target, state)
        context = torch.softmax(written @ memory.transpose(1, 2), dim=-1) @ memory
        return self.head(torch.cat([written, context], dim=-1))


class Minimal(nn.Module):
    """A recurrence written out in plain products, its state a buffer-like tensor made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], WIDTH)
        for step in x.unbind(dim=1):
            both = torch.cat([step, state], dim=-1)
            gate = torch.sigmoid(self.gate(both))
            state = gate * state + (1 - gate) * torch.tanh(self.value(both))
        return self.head(state)


def words(steps: int, seed: int = 0, first: int = 2) -> Tensor:
    return torch.randint(0, 30, (first, steps), generator=torch.Generator().manual_seed(seed))


SEQUENCE: Inputs = (numbers(2, STEPS, WIDTH),)
PADDING = torch.tensor([[False] * STEPS, [False] * (STEPS - 2) + [True] * 2])
Entry = tuple[Callable[[], nn.Module], Inputs, str]

TRANSFORMERS: Mapping[str, Entry] = {
    "transformer": (partial(Translator, batch_first=True), (words(STEPS), words(STEPS - 1, 1)), "encoder-decoder"),
    "transformer_time_first": (Translator, (words(2, first=STEPS), words(2, 1, STEPS - 1)), "encoder-decoder"),
    "transformer_norm_first": (
        partial(Translator, batch_first=True, norm_first=True), (words(STEPS), words(STEPS - 1, 1)), "encoder-decoder"),
    "encoder": (Stack, SEQUENCE, "encoder"),
    "encoder_gelu": (partial(Stack, activation="gelu", dropout=0.2), SEQUENCE, "encoder"),
    "encoder_padded": (Padded, (*SEQUENCE, PADDING), "encoder"),
    "decoder": (Decoder, (numbers(2, STEPS - 1, WIDTH), numbers(2, STEPS, WIDTH)), "decoder"),
    "attention": (Attention, SEQUENCE, "attention"),
}  # fmt: skip


def _tagger(kind: Callable[..., nn.RNNBase], features: int = WIDTH, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Tagger(kind(WIDTH, WIDTH, batch_first=True, **options), features)


RECURRENT: Mapping[str, Entry] = {
    "rnn": (_tagger(nn.RNN), SEQUENCE, "layer"),
    "rnn_relu": (_tagger(nn.RNN, nonlinearity="relu"), SEQUENCE, "layer"),
    "lstm": (_tagger(nn.LSTM), SEQUENCE, "layer"),
    "lstm_two_layers": (_tagger(nn.LSTM, 2 * WIDTH, num_layers=2, bidirectional=True, dropout=0.1), SEQUENCE, "layer"),
    "lstm_projected": (_tagger(nn.LSTM, 8, proj_size=8), SEQUENCE, "layer"),
    "gru": (_tagger(nn.GRU), SEQUENCE, "layer"),
    "gru_bidirectional": (_tagger(nn.GRU, 2 * WIDTH, bidirectional=True), SEQUENCE, "layer"),
    "lstm_packed": (
        lambda: Packed(nn.LSTM(WIDTH, WIDTH, batch_first=True)), (*SEQUENCE, torch.tensor([STEPS, STEPS - 2])), "lengths"),
    "gru_packed": (
        lambda: Packed(nn.GRU(WIDTH, WIDTH, batch_first=True)), (*SEQUENCE, torch.tensor([STEPS, STEPS - 2])), "lengths"),
    "rnn_cell": (lambda: Unrolled(nn.RNNCell(WIDTH, WIDTH)), SEQUENCE, "cell in a loop"),
    "lstm_cell": (lambda: Unrolled(nn.LSTMCell(WIDTH, WIDTH)), SEQUENCE, "cell in a loop"),
    "gru_cell": (lambda: Unrolled(nn.GRUCell(WIDTH, WIDTH)), SEQUENCE, "cell in a loop"),
    "minimal_gated_unit": (Minimal, SEQUENCE, "written out"),
    "reader_and_writer": (Pair, (numbers(2, STEPS, WIDTH), numbers(2, STEPS - 1, WIDTH)), "encoder-decoder"),
}  # fmt: skip


def provider(entries: Mapping[str, Entry]) -> Provider:
    """Of models that are there as classes."""

    def build(name: str) -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        return entries[name][0]().train(), entries[name][1]

    return Provider(lambda: {name: kind for name, (_, _, kind) in entries.items()}, build)


TRANSFORMER_PROVIDER, RECURRENT_PROVIDER = provider(TRANSFORMERS), provider(RECURRENT)
