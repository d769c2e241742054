"""Residual branches: which values they are in small models, judged by hand, and in language models; ten others: test_ten_models.py."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "branches.json").read_text())
X = torch.randn(3, 5, 4)


class Model(nn.Module):
    """Layers for the forwards below: ``forward`` calls the function that it was made with."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.drop, self.table, self.bias = nn.LayerNorm(4), nn.Dropout(0.1), nn.Embedding(9, 4), nn.Parameter(torch.ones(4))
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def found(model: nn.Module, inputs: Any = None) -> list[str]:
    return [site.name for site in graphreg.trace(model, inputs).values if site.branch]


def scaled(m: Any, x: Tensor) -> Tensor:
    return 0.1 * m.b(F.relu(m.a(x))) + x


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(x)))
    y += x
    return y


def post_norm(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.a(x) + x)
    return m.norm(m.drop(m.b(h)) + h)


def pre_norm(m: Any, x: Tensor) -> Tensor:
    h = x + m.a(m.norm(x))
    return h + m.drop(m.b(m.norm(h)))


def parallel(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.a(h) + m.b(F.relu(h)) + x


def parallel_after(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return x + m.a(h) + m.b(F.relu(h))


def long_skip(m: Any, x: Tensor) -> Tensor:
    deep = m.a(x)
    return x + (deep + m.b(F.relu(deep)))


def projected(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.c(x)) + m.b(F.relu(m.a(x)))


def bilinear(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(x) + m.b(h * h)


def positioned(m: Any, x: Tensor) -> Tensor:
    h = x + m.bias
    return m.drop(h).transpose(1, 2).transpose(1, 2) + m.a(h)


def reshaped(m: Any, x: Tensor) -> Tensor:
    return x + m.a(x.flatten(0, 1)).view(x.shape)


def pool_mixer(m: Any, x: Tensor) -> Tensor:
    """As in PoolFormer."""
    h = x + (F.avg_pool1d(m.norm(x), 3, 1, 1) - x) * m.bias
    return h + m.b(F.relu(m.a(m.norm(h))))


def fourier_mixer(m: Any, x: Tensor) -> Tensor:
    """As in FNet."""
    h = m.norm(x + torch.fft.fft2(x).real)
    return m.norm(m.b(F.relu(m.a(h))) + h)


def pooled_shortcut(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x))) + m.c(F.avg_pool1d(x, 3, 1, 1))


RESIDUAL: dict[Callable[..., Any], list[str]] = {
    scaled: ["mul"],
    in_place: ["b"],
    post_norm: ["a", "drop"],
    pre_norm: ["a", "drop"],
    parallel: ["a", "b"],
    parallel_after: ["a", "b"],
    long_skip: ["b", "add"],
    projected: ["b"],
    bilinear: ["b"],
    positioned: ["a"],
    reshaped: ["view"],
    pool_mixer: ["mul", "b"],
    fourier_mixer: ["getattr", "b"],
    pooled_shortcut: ["b"],
    lambda m, x: torch.add(x, m.a(x), alpha=0.5): ["a"],
    lambda m, x: x.add(m.a(x)): ["a"],
    lambda m, x: m.norm(x.clone()).add_(m.b(F.relu(m.a(x)))): ["b"],
}  # fmt: skip


@pytest.mark.parametrize("call", RESIDUAL, ids=lambda call: call.__name__)
def test_what_a_residual_sum_adds(call: Callable[..., Any]) -> None:
    assert found(Model(call)) == RESIDUAL[call]


def low_rank(m: Any, x: Tensor) -> Tensor:
    """As LoRA: one layer, whose weight has a change of low rank."""
    return m.a(x) + m.c(m.b(m.drop(x))) * 0.5


def gelu(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044 * h**3))))


def highway(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.a(x))
    return gate * m.b(x) + (1 - gate) * x


def gated_unit(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(3):
        z = torch.sigmoid(m.a(x[:, t]) + m.b(h))
        h = (1 - z) * torch.tanh(m.c(x[:, t]) + m.d(h)) + z * h
    return h


def unrolled(m: Any, x: Tensor) -> Tensor:
    steps = m.a(x)
    h = torch.tanh(steps[:, 0])
    for t in (1, 2):
        h = torch.tanh(steps[:, t] + m.b(h))
    return h


def by_chance(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h) + torch.randn_like(h) * torch.exp(m.c(h))


def losses(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    target = torch.zeros(3, dtype=torch.long)
    one, two = F.cross_entropy(m.b(h)[:, 0], target), F.cross_entropy(m.d(F.relu(m.c(h)))[:, 0], target)
    return one + 0.4 * two


def subtracted(m: Any, x: Tensor) -> Tensor:
    return x - m.a(x)


def two_ways(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x)


PLAIN = [gelu, highway, gated_unit, unrolled, by_chance, losses, subtracted, two_ways, low_rank]


@pytest.mark.parametrize("call", PLAIN, ids=lambda call: call.__name__)
def test_sums_that_are_not_residual(call: Callable[..., Any]) -> None:
    """Nothing is a branch where no product lies between, a trunk would be gated, or neither summand is what the other was made of."""
    assert found(Model(call)) == []


class ReturnsPair(nn.Module):
    """Opaque, because it decides something on values."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.l(x), x.mean()) if x.sum() < 1e9 else (x, x.mean())


class JoinsTuples(nn.Module):
    """As layers of transformers: what a layer returns is a tuple, to which the rest of another one is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.b = nn.Linear(4, 4), ReturnsPair(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h = self.first(x)
        attended = self.attention(h)
        outputs = (h + attended[0],) + attended[1:]  # a star would iterate over it
        outputs = (self.b(outputs[0]) + outputs[0],) + outputs[1:]
        return outputs[0], outputs[1]


@pytest.mark.parametrize("known", [True, False])
def test_joining_tuples_is_no_sum(known: bool) -> None:
    sites = graphreg.trace(JoinsTuples(), **({"example_inputs": torch.randn(3, 4)} if known else {})).values
    assert [site.name for site in sites if site.branch] == ["attention", "b"]


def test_embeddings_and_masks_are_no_trunks() -> None:
    class Attends(Model):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = self.table(ids) + self.table(ids.cumsum(1) % 9)
            hidden = (1.0 - mask.float())[:, None] * -1e9
            for one, two in ((self.a, self.b), (self.c, self.d)):
                weights = one(h) @ two(h).transpose(1, 2) / math.sqrt(4) + hidden
                h = h + weights.softmax(-1) @ h
            return h

    ids = torch.ones(2, 3, dtype=torch.long)
    assert found(Attends(scaled), (ids, ids)) == ["matmul_1", "matmul_3"]


class Pyramid(nn.Module):
    """As a feature pyramid: what is added was projected, and made in other modules than the one that adds."""

    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, low: Tensor, high: Tensor) -> Tensor:
            return self.one(low) + self.two(high)

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.neck = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), self.Neck()

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        return self.neck(low, self.high(low))


def test_a_projected_trunk_within_the_module_that_adds_alone() -> None:
    assert found(Pyramid()) == []
    assert found(Model(projected)) == ["b"]


def test_the_mark_beside_the_roles() -> None:
    """A branch that a product reads is hidden, too; each selector string finds it by either."""
    traced = graphreg.trace(Model(lambda m, x: m.c(x + (h := F.relu(m.a(x)))) + m.b(h)))
    relu = next(site for site in traced.values if site.name == "relu")
    assert (relu.role, relu.branch, relu.marked, relu.to_dict()["branch"]) == ("hidden", True, ("hidden", "branch"), True)
    for selector, names in {"**#branch": ["relu"], "re*#branch": ["relu"], "**#hidden": ["relu", "add"]}.items():
        edits = graphreg.plan(traced, graphreg.build("dropout", weight=0.1, pattern=selector)).edits
        assert [edit.site.name for edit in edits] == names
    assert "hidden, branch" in str(graphreg.names(traced.model))
    error = r"The name exists, but not with this op, port or role. It has: ops add; ports out; roles hidden\."
    with pytest.raises(graphreg.NoMatchError, match=error):
        graphreg.plan(traced, graphreg.build("dropout", weight=0.1, pattern="add#branch"))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("call", [pre_norm, projected, parallel], ids=lambda call: call.__name__)
def test_both_front_ends(call: Callable[..., Any], front_end: Any) -> None:
    traced = graphreg.trace(Model(call), X, front_end)
    assert [site.name for site in traced.values if site.branch] == RESIDUAL[call]


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_language_models(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import language_models  # noqa: PLC0415 - it imports transformers, which takes seconds
    model = language_models.build(name)
    given = language_models.batch() | {"attention_mask": torch.ones(3, 7, dtype=torch.long)}
    assert found(model, given) == GOLDEN[name]


COUNTS = {
    "convnext_atto": 12, "mixer_s32_224": 16, "deit_tiny_patch16_224": 24, "regnetx_002": 13, "resnetv2_50": 16, "resnet18d": 8,
    "densenet121": 0,
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("name", COUNTS)
def test_models_of_timm(name: str) -> None:
    """Each block has its branches: one in a block of convolutions, two in one of a transformer or mixer."""
    import timm  # noqa: PLC0415  (it takes seconds)

    size = 224 if name.endswith("224") else 64
    assert len(found(timm.create_model(name), torch.zeros(1, 3, size, size))) == COUNTS[name]


def trunks(model: nn.Module, inputs: Any = None) -> dict[str, str]:
    return {site.name: site.trunk for site in graphreg.trace(model, inputs).values if site.trunk}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (scaled, ["x"]),
        (pre_norm, ["x", "add"]),
        # what lies between a sum and the next branch; not the dropout of a branch, and not the last sum
        (post_norm, ["x", "add", "norm"]),
        (lambda m, x: (h := m.drop(F.relu(x + m.a(x)).view(-1, 4))) + m.b(h), ["x", "add", "relu", "view", "drop"]),
        # a sum within the sum; a sum of two branches is none of them
        (parallel_after, ["x", "add"]),
        (parallel, ["x"]),
        (projected, ["x", "c", "norm"]),
        # what starts the trunk
        (lambda m, x: m.d((h := m.drop(m.c(x))) + m.b(m.norm(h))), ["c", "drop"]),
        (lambda m, x: m.a(x) + x ** 3, ["x", "pow"]),
        (lambda m, x: m.b(F.relu(m.a(x))) + m.c(x), ["x", "c"]),
        (lambda m, x: m.b(F.relu(m.a(x))), []),
    ],
)  # fmt: skip
def test_the_trunk(call: Callable[..., Any], expected: list[str]) -> None:
    found = trunks(Model(call))
    assert list(found) == expected and set(found.values()) == set(expected[:1])


def test_each_trunk_by_its_first_value() -> None:
    def two(m: Any, x: Tensor) -> Tensor:
        h, k = m.c(m.norm(x)), x + m.a(x)
        y: Tensor = (k + m.d(k)) * (h + m.b(h))
        return y

    assert trunks(Model(two)) == {"x": "x", "c": "c", "add": "x"}


class Conditioned(nn.Module):
    """As in WaveGlow: each layer adds its part of a condition, and gives a part to the trunk and a part to a sum of skips."""

    def __init__(self, chunks: bool) -> None:
        super().__init__()
        self.start, self.condition, self.end, self.chunks = nn.Conv1d(2, 4, 1), nn.Conv1d(3, 16, 1), nn.Conv1d(4, 2, 1), chunks
        self.inner, self.both = (nn.ModuleList(nn.Conv1d(4, 8, 1) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor, given: Tensor) -> Any:
        x, condition = self.start(x), self.condition(given)
        skips = torch.zeros_like(x)
        for i in range(2):
            part = condition.chunk(2, 1)[i] if self.chunks else condition[:, 8 * i : 8 * i + 8]
            h = self.inner[i](x) + part
            more = self.both[i](torch.tanh(h[:, :4]) * torch.sigmoid(h[:, 4:]))
            x, skips = x + more[:, :4], skips + more[:, 4:]
        return self.end(skips), x


@pytest.mark.parametrize("chunks", [False, True])
def test_parts_of_a_condition_are_no_trunk(chunks: bool) -> None:
    model, inputs = Conditioned(chunks), (torch.randn(2, 2, 5), torch.randn(2, 3, 5))
    traced = graphreg.trace(model, inputs)
    (graph,) = traced.graphs.values()
    branches = found(model, inputs)
    of_both = [node for node in graph.nodes if node.op == "call_function" and "both" in str(node.args[0])]
    assert branches == [node.name for node in of_both if node.args[1][1].start is None] and len(branches) == 2


class Skips(nn.Module):
    """As in WaveNet: the sum of what each block's second convolution reads from the trunk is no residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.back, self.skip = (nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        skips: Any = 0
        for inner, back, skip in zip(self.inner, self.back, self.skip, strict=True):
            h = torch.tanh(inner(x))
            x, skips = back(h) + x, skips + skip(h)
        return skips, x


def test_a_sum_of_skips_is_not_residual() -> None:
    assert found(Skips(), torch.randn(2, 2, 5)) == ["back.0", "back.1", "back.2"]


@pytest.mark.parametrize("detached", [True, False])
def test_a_mean_that_is_added_again_is_no_trunk(detached: bool) -> None:
    """As in reversible instance normalization."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        mean = mean.detach() if detached else mean
        h = m.a(x - mean)
        y: Tensor = h + m.c(F.relu(m.b(h))) + mean
        return y

    assert found(Model(forward), torch.randn(2, 6, 4)) == ["c"]
    if detached:
        assert found(Model(forward)) == ["c"]


def test_a_repeated_summand_is_no_branch() -> None:
    """As the query of additive attention in a decoder, or the context of a GC block."""

    def forward(m: Any, x: Tensor) -> Any:
        keys = m.a(x)
        query = m.b((torch.softmax(keys, 1) * x).sum(1))
        return keys + query.unsqueeze(1), keys + m.c(query).unsqueeze(1) + m.d(F.relu(m.c(keys)))

    assert found(Model(forward), torch.randn(2, 6, 4)) == ["d"]


def test_a_trunk_into_which_a_signal_is_written() -> None:
    """As in a masked autoencoder; what has nothing but the shape of a signal is no trunk."""

    def forward(m: Any, x: Tensor) -> Any:
        shown, zeros = torch.zeros_like(x), torch.zeros_like(x)
        shown[:, ::2] = x[:, ::2]
        return shown + m.a(shown), zeros + m.b(x)

    assert found(Model(forward), torch.randn(2, 6, 4)) == found(Model(forward)) == ["a"]


def test_a_cropped_or_thinned_trunk_is_one() -> None:
    assert found(Model(lambda m, x: x[:, ::2] + m.a(x)[:, 1::2]), torch.randn(2, 6, 4)) == ["getitem_1"]


class Decoder(nn.Module):
    """Learned queries that read a memory, as in DETR and Perceiver; positions that each layer adds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.positions, self.scale, self.head = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.rand(4, 8)), *linears(2)
        self.own, self.cross = ([nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)] for _ in range(2))
        self.layers, self.mix, self.norm = nn.ModuleList([*self.own, *self.cross]), nn.ModuleList(linears(2)), nn.LayerNorm(8)

    def forward(self, memory: Tensor) -> Tensor:
        h = self.queries.expand(len(memory), -1, -1)
        positions = self.scale(self.positions)
        for own, cross, mix in zip(self.own, self.cross, self.mix, strict=True):
            q = h + positions
            h = self.norm(h + own(q, q, h)[0])
            h = h + cross(h + positions, memory, memory)[0]
            h = h + mix(h).relu()
        y: Tensor = self.head(h)
        return y


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(8, 8) for _ in range(count)]


def test_learned_queries_are_a_trunk_and_positions_are_none() -> None:
    assert found(Decoder(), torch.randn(2, 5, 8)) == ["layers.0", "layers.2", "relu", "layers.1", "layers.3", "relu_1"]


def test_a_state_to_which_a_later_sum_adds_is_no_branch() -> None:
    """As in the mask decoder of SAM: each attention gets the first tokens once more."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(x + m.a(x).mean(1, keepdim=True).expand_as(x))
        q = h + x
        y: Tensor = h + m.c(F.relu(m.b(q)))
        return y

    assert found(Model(forward), torch.randn(2, 6, 4)) == ["expand_as", "c"]


class LearnedQueries(nn.Module):
    """Perceiver: attention of learned queries, then of queries from data."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.q, self.kv, self.out = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.latents.expand(len(x), -1, -1)
        for context in (x, None):
            k, v = self.kv(h if context is None else context).chunk(2, -1)
            h = h + self.out(torch.softmax(self.q(h) @ k.transpose(1, 2), -1) @ v)
        return h


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_keys_are_no_hidden_values_whether_the_queries_are_learned_or_not(front_end: Any) -> None:
    traced = graphreg.trace(LearnedQueries(), torch.randn(2, 5, 8), front_end=front_end)
    assert [site.name for site in traced.values if site.role == "hidden"] == ["matmul_1", "add", "matmul_3"]


def test_a_layer_with_weights_reads_what_learned_queries_attend_to() -> None:
    class Attends(LearnedQueries):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.out(x).relu()
            y: Tensor = self.out(self.attend(self.q(self.latents).expand(len(x), -1, -1), h, h)[0])
            return y

    traced = graphreg.trace(Attends(), torch.randn(2, 5, 8))
    assert [site.name for site in traced.values if site.role == "hidden"] == ["relu", "attend"]
