"""Draws under torch.vmap: refused, of each row its own by its place in the batch, or one for all rows, as ``randomness`` says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import graphreg
from graphreg import Noise, Splice
from graphreg.errors import GraphRegError
from graphreg.passes import BernoulliDropout, GaussianNoise
from graphreg.rng.noise import key_of_row
from graphreg.torch_internals.functorch import transforms

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
Tensors = dict[str, Tensor]


def regularized(*regularizers: Splice, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3))
    return graphreg.regularize(model, *(regularizers or [BernoulliDropout("1", 0.5), GaussianNoise("2", 0.3)]), rng=3, **options)


def rows(module: Any, x: Tensor, **options: Any) -> Tensor:
    found: Tensor = vmap(lambda row: module(row).output, **{"randomness": "different", **options})(x)
    return found


def alone(module: Any, x: Tensor, place: int, call: int = 0, parameters: Tensors | None = None) -> Any:
    """One row with the masks of its place: the function that vmap maps, called with that row's keys."""
    twin = copy.deepcopy(module)
    key = twin.graphreg_rules.key
    key.seek(call)
    key.keys = torch.stack([key_of(each, place) for each in key.keys])
    return functional_call(twin, parameters or dict(twin.named_parameters()), (x,)).output


def key_of(key: Tensor, *places: int) -> Tensor:
    """The key of a row, by vmap over just as many rows, of which it is the last."""
    if not places:
        return key
    outer: Tensor = vmap(lambda _: key_of_row(key), randomness="different")(torch.zeros(places[0] + 1))[-1]
    return key_of(outer, *places[1:])


def loss(module: Any, parameters: Tensors, row: Tensor) -> Tensor:
    total: Tensor = functional_call(module, parameters, (row,)).output.square().sum()
    return total


def per_sample(module: Any, x: Tensor, **options: Any) -> Tensors:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def of(p: Tensors, row: Tensor) -> Tensor:
        return loss(module, p, row)

    found: Tensors = vmap(grad(of), in_dims=(None, 0), **{"randomness": "different", **options})(parameters, x)
    return found


def test_error_is_an_error_of_torchs_kind_with_a_sentence() -> None:
    module = regularized()
    message = "whose randomness is 'error'. Give vmap randomness='different'"
    for kind in (GraphRegError, RuntimeError):
        with pytest.raises(kind, match=message):
            rows(module, X, randomness="error")
    with pytest.raises(RuntimeError, match=message):
        vmap(lambda row: module(row).output)(X)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(lambda: vmap(lambda row: module(row).output)(X), backend="eager", fullgraph=True)()
    module.eval()
    rows(module, X, randomness="error")


def test_different_rows_have_masks_by_their_place_in_the_batch() -> None:
    module = regularized()
    same = X[:1].expand(4, -1)
    found = rows(module, same)
    assert len({tuple(row.tolist()) for row in found}) == 4
    for place, row in enumerate(found):
        torch.testing.assert_close(row, alone(module, same[0], place))
    assert graphreg.rng_state(module)["call"] == 1
    torch.testing.assert_close(rows(module, same)[2], alone(module, same[0], 2, call=1))
    module.graphreg_rules.key.seek(0)
    torch.testing.assert_close(rows(module, same[:2]), found[:2])  # a longer batch begins as a shorter one


def test_same_rows_agree_with_the_module_called_without_vmap() -> None:
    module = regularized()
    twin = copy.deepcopy(module)
    torch.testing.assert_close(rows(module, X, randomness="same"), torch.stack([_at(twin, row, 0) for row in X]))
    assert graphreg.rng_state(module)["call"] == 1


def _at(module: Any, x: Tensor, call: int) -> Tensor:
    module.graphreg_rules.key.seek(call)
    output: Tensor = module(x).output
    return output


def test_gradients_of_samples_are_those_of_each_with_its_own_mask() -> None:
    module = regularized()
    found = per_sample(module, X)
    for place, row in enumerate(X):
        parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
        total = alone(module, row, place, parameters=parameters).square().sum()
        expected = torch.autograd.grad(total, list(parameters.values()))
        torch.testing.assert_close([found[name][place] for name in parameters], list(expected))
    key = module.graphreg_rules.key
    assert key.call() == 1 and not torch._C._functorch.is_functorch_wrapped_tensor(key.step)


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("size", [1, 3])
def test_chunks_are_parts_of_one_batch(randomness: str, size: int) -> None:
    """Nothing of the masks or of the count of calls depends on the chunk_size; a module called twice has two calls."""
    module = regularized()

    def twice(row: Tensor) -> Tensor:
        output: Tensor = module(row).output + 2 * module(row * 2).output
        return output

    for call in (0, 2):
        module.graphreg_rules.key.seek(call)
        whole = vmap(twice, randomness=randomness)(X)
        module.graphreg_rules.key.seek(call)
        torch.testing.assert_close(vmap(twice, randomness=randomness, chunk_size=size)(X), whole)
        assert graphreg.rng_state(module)["call"] == call + 2
    with graphreg.frozen_noise(module):
        held = rows(module, X, randomness=randomness, chunk_size=size)
        torch.testing.assert_close(rows(module, X, randomness=randomness), held)


def test_chunks_within_chunks_are_refused() -> None:
    module = regularized()
    x = torch.stack([X, X + 1])
    with pytest.raises(GraphRegError, match="two vmaps that both have a chunk_size"):
        vmap(lambda part: rows(module, part, chunk_size=2), randomness="different", chunk_size=1)(x)
    assert vmap(lambda part: rows(module, part), randomness="different", chunk_size=1)(x).shape == (2, 4, 3)


def test_nested() -> None:
    """Each level by what it says: [different, different], [different, same], [same, different]; an error at any is one."""
    module = regularized()
    x = X[0].expand(2, 4, -1)

    def found(outer: str, inner: str) -> Tensor:
        module.graphreg_rules.key.seek(0)
        made: Tensor = vmap(lambda part: rows(module, part, randomness=inner), randomness=outer)(x)
        return made

    def different(made: Tensor) -> int:
        return len({tuple(row.tolist()) for row in made.flatten(0, 1)})

    both = found("different", "different")
    assert different(both) == 8
    twin = copy.deepcopy(module)
    twin.graphreg_rules.key.seek(0)
    twin.graphreg_rules.key.keys = torch.stack([key_of(each, 1, 2) for each in twin.graphreg_rules.key.keys])
    torch.testing.assert_close(both[1, 2], twin(x[1, 2]).output)
    outer, inner = found("different", "same"), found("same", "different")
    assert different(outer) == 2 and torch.allclose(outer[:, 0], outer[:, 1]) and not torch.allclose(outer[0], outer[1])
    assert different(inner) == 4 and torch.allclose(inner[0], inner[1])
    for levels in (("error", "same"), ("different", "error")):
        with pytest.raises(RuntimeError, match="randomness is 'error'"):
            found(*levels)


def test_an_ensemble_over_parameters_of_one_input() -> None:
    """vmap over parameters alone: the values before the first product are not mapped, and masks differ all the same."""
    module = regularized(BernoulliDropout("input", 0.5), BernoulliDropout("1", 0.5))
    members = [{name: p.detach() + i for name, p in module.named_parameters()} for i in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}

    def found(randomness: str) -> Tensor:
        module.graphreg_rules.key.seek(0)
        made: Tensor = vmap(lambda p: functional_call(module, p, (X,)).output, randomness=randomness)(stacked)
        return made

    different, same = found("different"), found("same")
    for i, member in enumerate(members):
        torch.testing.assert_close(different[i], alone(module, X, i, parameters=member))
        module.graphreg_rules.key.seek(0)
        torch.testing.assert_close(same[i], functional_call(module, member, (X,)).output)


def test_the_noises_own_counter_is_not_mapped() -> None:
    module = regularized()
    state = {name: tensor.detach().expand(2, *tensor.shape) for name, tensor in [*module.named_parameters()]}
    state |= {f"graphreg_rules.key.{name}": b.expand(2, *b.shape) for name, b in module.graphreg_rules.key.named_buffers()}
    with pytest.raises(GraphRegError, match="Leave out the names that begin with 'graphreg_rules.'"):
        vmap(lambda s: functional_call(module, s, (X,)).output, randomness="different")(state)


def test_a_counter_that_would_be_put_back_behind_the_call_is_refused() -> None:
    """functional_call would leave the noise where it was, and each call would draw the same masks."""
    module = regularized()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    for given in ({**parameters, **buffers}, (parameters, copies)):
        with pytest.raises(GraphRegError, match="each call would draw the same masks. Leave out the names that begin with"):
            functional_call(module, given, (X,))
        with pytest.raises(GraphRegError, match="each call would draw the same"):
            vmap(lambda x, given=given: functional_call(module, given, (x,)).output, randomness="different")(X)
        with graphreg.frozen_noise(module):
            functional_call(module, given, (X,))
    module.graphreg_rules.key.seek(0)
    own = {name: buffer for name, buffer in buffers.items() if "graphreg_rules." not in name}
    first, second = (functional_call(module, (parameters, own), (X,)).output for _ in range(2))
    assert not torch.equal(first, second) and graphreg.rng_state(module)["call"] == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning")  # by which torch decomposes for jvp
def test_under_grad_and_jvp_alone_the_masks_are_those_of_a_plain_call() -> None:
    module = regularized()
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    expected = torch.autograd.grad(loss(module, parameters, X), list(parameters.values()))
    key = module.graphreg_rules.key
    key.seek(0)
    torch.testing.assert_close(list(grad(lambda p: loss(module, p, X))(parameters).values()), list(expected))
    key.seek(0)
    value, _ = jvp(lambda x: module(x).output, (X,), (X,))
    key.seek(0)
    torch.testing.assert_close(value, module(X).output)
    assert key.call() == 1 and not transforms()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_draw(dtype: torch.dtype) -> None:
    """A row's draws are those that its key gives outside; of a value without an axis of its own, too."""
    key = torch.tensor([3, -9], dtype=torch.int32)

    def draws(key: Tensor, z: Tensor) -> Tensor:
        noise = Noise(key)
        return torch.stack([noise.keep(z, 0.4).to(dtype), noise.uniform(z).to(dtype), noise.normal(z), noise.uniform(z).to(dtype)])

    for shape in ((5, 3), ()):
        z = torch.zeros(4, *shape, dtype=dtype)
        found = vmap(lambda z: draws(key, z), randomness="different")(z)
        torch.testing.assert_close(found, torch.stack([draws(key_of(key, i), each) for i, each in enumerate(z)]))


def test_rows_do_not_resemble_each_other() -> None:
    drawn = vmap(lambda z: Noise(torch.tensor([3, -9], dtype=torch.int32)).uniform(z), randomness="different")(torch.zeros(64, 4096))
    correlations = torch.corrcoef(drawn.double()).fill_diagonal_(0).abs() * 64
    assert float(correlations.max()) < 5  # of 2016 pairs, normal
    assert len(torch.unique(drawn)) > 0.98 * drawn.numel()


class Within(Splice, keys=("vmap_within",)):
    """A formula that maps by itself."""

    randomness: str = "error"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        made: Tensor = vmap(lambda row: row * noise.keep(row, weight), randomness=self.randomness)(z)
        return made


def test_a_formula_that_maps_by_itself() -> None:
    for randomness in ("different", "same"):
        module = regularized(Within("0", 0.5, randomness=randomness))
        kept = module.get_submodule("graphreg_rules._0_vmap_within")(torch.ones(4, 64), module.graphreg_rules.key.keys)
        assert len({tuple(row.tolist()) for row in kept}) == (4 if randomness == "different" else 1)
    with pytest.raises(RuntimeError, match="randomness is 'error'"):
        regularized(Within("0", 0.5))(X)


def test_a_batched_backward_through_a_checkpoint_draws_the_forwards_masks_again() -> None:
    """Its vmap is over gradients, not over what the forward drew for."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = regularized(BernoulliDropout("0", 0.5))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.module(x).output
            return output

    net, x = Net(), X.clone().requires_grad_()
    with graphreg.frozen_noise(net.module):
        plain = torch.stack(torch.autograd.grad(net(x)[:, 0].sum(), [x]) + torch.autograd.grad(net(x)[:, 1].sum(), [x]))
        output = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        vectors = torch.zeros(2, *output.shape)
        vectors[0, :, 0] = vectors[1, :, 1] = 1
        (batched,) = torch.autograd.grad(output, [x], vectors, is_grads_batched=True)
    torch.testing.assert_close(batched, plain)


def test_torchs_own_dropout_that_was_moved_goes_by_the_rows_too() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.a(x), 0.5, self.training)

    module = graphreg.regularize(Own(), own_dropout="seeded", rng=1)
    kept = vmap(lambda row: module(row).output, randomness="different")(X[:1].expand(64, -1)) != 0
    assert len({tuple(row.tolist()) for row in kept}) > 30
    with pytest.raises(RuntimeError, match="randomness is 'error'"):
        vmap(lambda row: module(row).output)(X)


@pytest.mark.parametrize("function", [rows, per_sample])
def test_compiled_whole_it_is_eager(function: Any) -> None:
    module = regularized(BernoulliDropout("1", 0.5))
    expected = [function(module, X) for _ in range(2)]
    module.graphreg_rules.key.seek(0)
    run = torch.compile(lambda x: function(module, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close([run(X) for _ in range(2)], expected)
    assert module.graphreg_rules.key.call() == 2


def test_inductor_draws_a_rows_words() -> None:
    """What is 0-d to a vmap it multiplies in float32 (torch 2.13)."""
    key = torch.tensor([3, -9], dtype=torch.int32)

    def drawn(x: Tensor) -> Any:
        return vmap(lambda row: (Noise(key).uniform(row), Noise(key).uniform(row[0])), randomness="different")(x)

    torch.testing.assert_close(torch.compile(drawn, fullgraph=True)(X), drawn(X), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo asks for it of what a vmap maps
def test_compiled_in_chunks_it_is_drawn_outside_of_the_graphs() -> None:
    module = regularized(BernoulliDropout("1", 0.5))
    expected = rows(module, X)

    def chunked(x: Tensor) -> Tensor:
        return rows(module, x, chunk_size=3)

    module.graphreg_rules.key.seek(0)
    torch.testing.assert_close(torch.compile(chunked, backend="eager")(X), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the noise of a vmap with a chunk_size is drawn outside of compiled graphs"):
        torch.compile(chunked, backend="eager", fullgraph=True)(X)
