from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, LayerDrop
from spliced import Given, needs_a_rate
from two_layers import text


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).tanh())


class Stack(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_before_and_after() -> None:
    model = Stack()
    module = graphreg.regularize(model, layer_drop={"weight": 0.5, "pattern": "layers.*"}, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
layers_0_a = getattr(self.layers, "0").a(x)
tanh = layers_0_a.tanh()
layers_0_b = getattr(self.layers, "0").b(tanh)
add = x + layers_0_b
layers_0_add_layer_drop = self.graphreg_rules.layers_0_add_layer_drop(add, key, module_input = x)
layers_1_a = getattr(self.layers, "1").a(layers_0_add_layer_drop)
tanh_1 = layers_1_a.tanh()
layers_1_b = getattr(self.layers, "1").b(tanh_1)
add_1 = layers_0_add_layer_drop + layers_1_b
layers_1_add_layer_drop = self.graphreg_rules.layers_1_add_layer_drop(add_1, key, module_input = layers_0_add_layer_drop)
return graphreg_Regularized(layers_1_add_layer_drop, {})"""
    )
    before = text(graphreg.trace(model).graphs["both"].python_code("self").src)
    assert text(graphreg.strip(module).code) == before and "drop" not in before


def test_by_hand() -> None:
    """m · out + (1 - m) · in, unscaled, with one m for the batch; so are the gradients."""
    z, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True), torch.tensor([[5.0, 6.0], [7.0, 8.0]], requires_grad=True)
    for m in (1.0, 0.0):
        noise = Given(torch.full((1, 1), m))
        y = LayerDrop("0", 0.5)(z=z, weight=torch.tensor(0.5), noise=noise, module_input=x)
        assert torch.equal(y, m * z + (1 - m) * x)
        of_z, of_x = torch.autograd.grad(y.sum(), (z, x))
        assert torch.equal(of_z, torch.full((2, 2), m)) and torch.equal(of_x, torch.full((2, 2), 1 - m))


def outputs(module: nn.Module, x: Tensor, calls: int) -> list[Tensor]:
    return [module(x).output.detach() for _ in range(calls)]


@pytest.mark.parametrize("form", ["symbolic", "export", "in place"])
def test_the_output_is_that_of_a_stack_without_the_skipped_layers(form: str) -> None:
    """Each of the eight subsets of three layers comes, a whole batch has the same, and the share of each is that of the weight."""
    model, x = Stack(3), torch.randn(4, 3)
    if form == "in place":
        inner = graphreg.regularize_(model, layer_drop={"weight": 0.4, "pattern": "layers.*"}, rng=1)
        found = [inner(x).detach() for _ in range(200)]
        graphreg.strip_(model)
    else:
        module = graphreg.regularize(model, LayerDrop("layers.*", 0.4), rng=1, front_end=form, example_inputs=x)
        found = outputs(module, x, 200)
        assert torch.equal(module.eval()(x).output, model.eval()(x)) and graphreg.rng_state(module)["call"] == 200
    counts = []
    for subset in range(8):
        y = x
        for i, layer in enumerate(model.layers):
            y = layer(y) if subset >> i & 1 else y
        counts.append(sum(torch.allclose(each, y, atol=1e-6) for each in found))
    assert sum(counts) == 200 and counts[7] == pytest.approx(200 * 0.6**3, abs=35) and counts[0] == pytest.approx(200 * 0.4**3, abs=20)


def test_a_skipped_module_has_gradients_of_0() -> None:
    module, x = graphreg.regularize(Stack(), LayerDrop("layers.0", 0.5), rng=0), torch.randn(4, 3)
    seen = set()
    for _ in range(20):
        module.zero_grad()
        module(x).output.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        zero = all(bool((p.grad == 0).all()) for p in module.layers[0].parameters())  # type: ignore[index]
        seen.add(zero)
    assert seen == {True, False}


def test_it_reads_what_the_module_reads() -> None:
    """Dropout at the input of a layer acts on what takes the place of the layer's output, too, in whatever order the two are given."""
    for order in (1, -1):
        splices = [BernoulliDropout("layers.0", 0.5), LayerDrop("layers.1", 0.5)][::order]
        module, x = graphreg.regularize(Stack(), splices, rng=0), torch.randn(4, 3)
        assert "layers_1_add_layer_drop(add_1, key, module_input = layers_0_add_dropout)" in module.code
        module(x).output.sum().backward()


def test_compiled_it_is_eager() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = graphreg.regularize(Stack(), layer_drop={"layers.*": graphreg.by_depth(0.2, 0.6)}, drop_path=0.1, rng=3)
        step = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        x = torch.randn(4, 3, requires_grad=True)
        ys = [step(x).output for _ in range(4)]
        torch.stack(ys).square().sum().backward()
        results.append((ys, x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_a_layer_of_torch_and_a_verified_module() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in range(2)])

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, mask)
            return x

    model, x, mask = Encoder(), torch.randn(2, 3, 4), torch.zeros(3, 3)
    module = graphreg.regularize(model, LayerDrop("layers.*", 0.5), rng=0, front_end="symbolic", example_inputs=(x, mask), verify=True)
    found = {tuple(y.flatten().tolist()) for y in (module(x, mask).output for _ in range(20))}
    assert len(found) == 4 and tuple(x.flatten().tolist()) in found


def test_errors() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.twice, self.two, self.written = nn.Linear(3, 5), nn.Linear(5, 5), Two(), Written()

        def forward(self, x: Tensor) -> Tensor:
            h = self.twice(self.twice(self.wide(x)))
            return self.written(self.two(h, h.relu()) * 2)

    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.tanh() + b.tanh()

    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() + x.add_(1)

    needs_a_rate(LayerDrop)
    x = torch.randn(2, 3)
    for pattern, error, message in (
        ("wide", graphreg.RegularizerError, r"LayerDrop at wide: the module gets \(2, 3\) and returns \(2, 5\), so its input cannot take"),
        ("mul", graphreg.RegularizerError, r"LayerDrop at mul: 'mul' selects a value that is no module's output\. Name a module"),
        (
            "twice",
            graphreg.RegularizerError,
            r"LayerDrop at twice: twice is called 2 times, and its calls cannot be told apart\.",
        ),
        ("two", graphreg.RegularizerError, r"LayerDrop at two.*: two gets several values \(twice_1, relu\) from the rest of the model"),
        ("written", graphreg.TraceError, r"layer_drop at written.*: the model later writes into mul, which the splice reads"),
        ("*", graphreg.NoMatchError, r"Odd has none of the default sites of LayerDrop \(none: select the modules to skip, as in"),
    ):
        with pytest.raises(error, match=message):
            graphreg.regularize(Odd(), LayerDrop(pattern, 0.1))(x)
    with pytest.raises(graphreg.RegularizerError, match=r"LayerDrop: a selector that is a function selects values, not modules"):
        graphreg.regularize(Stack(), LayerDrop(lambda site: "layers.0" in site.names, 0.1))
    with pytest.raises(graphreg.RegularizerError, match=r"layer_drop: LayerDrop is not possible in a backend: a graph may be a part"):
        graphreg.backend(layer_drop={"weight": 0.1, "pattern": "layers.*"})


def test_a_module_that_gets_a_tensor_the_forward_makes_is_refused() -> None:
    """The KeyError that the fuzzer found: such a tensor has no name, and nothing could be handed to the formula."""

    class Making(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            made = torch.zeros(3)
            acted = self.act(made)
            made.add_(x.sum(0))
            return acted * made * x

    with pytest.raises(graphreg.RegularizerError, match=r"LayerDrop at act: act gets a value that has no name, .* Leave the module out\."):
        graphreg.regularize(Making(), LayerDrop("act", 0.5), rng=0)
