"""Small models to look at: a recurrent tagger, a GPT of twelve blocks, one with two forwards, one block called twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(20, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, c) = self.rnn(self.embed(x))
        return self.head(out) + self.head(h[-1] * c[-1]).unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.ln1, self.ln2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp, self.drop = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        split = self.qkv(self.ln1(x)).view(batch, steps, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(batch, steps, width)
        x = x + self.drop(self.proj(heads))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(nn.Module):
    def __init__(self, blocks: int = 12, width: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, width), nn.Embedding(32, width)
        self.h = nn.ModuleList(Block(width, 2) for _ in range(blocks))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


class TwoForwards(nn.Module):
    """Another structure in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h)) if self.training else self.b(h)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) + torch.relu(self.b(x))


class Again(nn.Module):
    """A block that is called twice, with something between: its box is entered again."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.between = Half(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.between(self.twice(x))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act, self.norm = nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)

    def forward(self, mask: Tensor, *before: Tensor) -> Tensor:
        x = before[0]
        for more in before[1:]:
            x = x + more
        return x + self.act(self.lin(self.norm(x))) * mask


class Blocks(nn.Module):
    """Blocks one after the other, each of which reads the mask; ``dense``: and the results of all blocks before it."""

    def __init__(self, count: int, dense: bool = False) -> None:
        super().__init__()
        self.h, self.dense = nn.ModuleList(Gated() for _ in range(count)), dense
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask, before = torch.relu(self.gate(x)), [x]
        for block in self.h:
            before.append(block(mask, *(before if self.dense else before[-1:])))
        return before[-1]


class Loops(nn.Module):
    """Loops over lists of modules: with something between their parts, one after another, and side by side."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(2))
        self.nested = nn.ModuleList([nn.ModuleList(nn.Linear(4, 4) for _ in range(2))])
        self.blocks = nn.ModuleList(Half() for _ in range(blocks))
        self.chain = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer, drop in zip(self.layers, self.drops, strict=True):
            x = drop(layer(x).tanh())
        for pair in self.nested:
            x = pair[1](pair[0](x).relu())  # type: ignore[index]
        for block in self.blocks:
            x = x + block(x)
        for layer in self.chain:
            x = layer(x)
        return torch.stack([head(x) for head in self.heads])
