"""Forwards that ask what a stand-in of a trace must answer as a tensor would: a question about a value, and a use of the answer."""

from __future__ import annotations

import random

import torch

from fuzz.scenes import Fragment, drawn

# Names that tensors may have or lack; more are drawn from those of torch.Tensor.
NAMES = (
    "mask", "bias", "foo", "node", "tracer", "_meta", "meta", "name", "args", "target", "users", "keys", "items", "append", "tensors",
    "logits", "last_hidden_state", "to_dict", "graph", "value", "__len__", "__iter__", "__call__", "__dict__", "__array__", "__getitem__",
    "__torch_function__", "__getattr__", "__bool__", "__index__", "__enter__", "__wrapped__", "_fields", "is_quantized", "grad",
)  # fmt: skip
TENSOR_NAMES = tuple(name for name in dir(torch.Tensor) if not name.startswith("_"))
TYPES = (
    "torch.Tensor", "nn.Parameter", "tuple", "list", "dict", "(list, tuple)", "(torch.Tensor, list)", "object", "int", "float", "str",
    "np.ndarray", "torch.Size", "type(None)", "nn.Module", "torch.FloatTensor", "collections.abc.Iterable", "collections.abc.Sequence",
    "collections.abc.Mapping", "collections.abc.Hashable", "collections.abc.Sized", "collections.abc.Callable", "numbers.Number",
)  # fmt: skip
TENSORS = ("h", "x", "h", "x", "h[0]", "h.detach()", "(h + 1.0)", "self.first.weight", "self.first.bias", "h.shape and h")
OF_TENSORS = (
    "hasattr({s}, '{name}')", "hasattr({s}, '{name}')", "getattr({s}, '{name}', None) is None", "callable(getattr({s}, '{name}', 0))",
    "'{name}' in dir({s})", "isinstance({s}, {type})", "isinstance({s}, {type})", "type({s}) is {type}", "{s}.__class__ is {type}",
    "issubclass(type({s}), {type})", "issubclass({s}.__class__, {type})", "torch.jit.isinstance({s}, torch.Tensor)", "callable({s})",
    "torch.is_tensor({s})", "torch.is_floating_point({s})", "{s}.requires_grad", "{s}.is_leaf", "{s}.grad_fn is None",
    "{s}.is_contiguous()", "{s}.dim() == 2", "{s}.ndim > 1", "len({s}) == 3", "{s}.stride() == (4, 1)", "({s}) is x", "({s}) is h",
    "{s}.is_floating_point()", "'float32' in repr({s})", "str({s}).startswith('tensor')", "hash({s}) == hash({s})", "({s}) is not None",
    "({s}) in [None]", "torch.overrides.is_tensor_like({s})", "{s}.layout is torch.strided", "{s}.is_cuda", "{s}.grad is None",
    "{s}.element_size() == 4", "{s}.numel() == 12", "{s}.nelement() == 12", "bool(({s} > 1e9).any())", "{s}.sum() > 1e9",
    "float({s}.abs().sum()) > 1e9", "{s}.sum().item() > 1e9", "{s}.tolist() != []", "vars({s}) == {{}}", "{s}.is_nested",
    "{s}.type() == 'torch.FloatTensor'", "{s}.__module__ == 'torch'", "type({s}).__name__ == 'Tensor'", "{s}.is_sparse",
    "{s}.__class__.__name__ in ('Tensor', 'Parameter')", "{s}.storage_offset() == 0", "{s}.names == (None, None)", "{s}.itemsize == 4",
    "type({s}) in (torch.Tensor, nn.Parameter)", "{{torch.Tensor: True}}.get(type({s}), False)", "torch.is_same_size({s}, x)",
    "inspect.isfunction({s})", "operator.truth({s} is x)", "isinstance(next(iter({s})), torch.Tensor)", "{s}.output_nr == 0",
    "torch.equal({s}, {s})", "torch.is_complex({s})", "{s}.is_signed()", "torch.allclose({s}, {s})", "f'{{{s}.dim()}}' == '2'",
    "torch.can_cast({s}.dtype, torch.int64)", "torch.numel({s}) == 12", "any(each is h for each in ({s}, 1))", "{s}.device.type == 'cpu'",
    "np.shape({s}) == (3, 4)", "np.ndim({s}) == 2", "np.isscalar({s})", "isinstance({s}.data, torch.Tensor)", "id({s}) == id({s})",
)  # fmt: skip
SIZES = ("h.shape", "x.shape", "h.size()", "self.first.weight.shape", "h.T.shape", "h.shape[:2]")
OF_SIZES = (
    "{s} == (3, 4)", "{s} == torch.Size([3, 4])", "isinstance({s}, tuple)", "isinstance({s}, torch.Size)", "type({s}) is torch.Size",
    "len({s}) == 2", "3 in {s}", "{s}[-1] == 4", "str({s}) == 'torch.Size([3, 4])'", "{s}.numel() == 12", "math.prod({s}) == 12",
    "np.prod({s}) == 12", "tuple({s}) == (3, 4)", "list({s})[0] == 3", "{s}[:1] == (3,)", "sum({s}) == 7", "sorted({s})[0] == 3",
    "{s}.count(4) == 1", "{s}.index(4) == 1", "{{(3, 4): True}}.get({s}, False)", "{s} in {{(3, 4)}}", "{s} != (4, 3)", "max({s}) == 4",
    "{s} + (1,) == (3, 4, 1)", "all(isinstance(n, int) for n in {s})", "hasattr({s}, '{name}')", "{s} is None", "{s} == [3, 4]",
    "isinstance({s}, {type})", "'3' in repr({s})", "{s} == x.shape", "{s}[1:] == x.shape[1:]", "(lambda n, c: n < c)(*{s})",
    "[*{s}] == [3, 4]", "dict(zip('nc', {s}))['c'] == 4", "f'{{{s}}}' == 'torch.Size([3, 4])'", "bool({s})", "{s} < (3, 5)",
    "functools.reduce(operator.mul, {s}) == 12", "len(range({s}[0])) == 3", "next(iter({s})) == 3", "list(reversed({s})) == [4, 3]",
)  # fmt: skip
DTYPES = ("h.dtype", "x.dtype", "self.first.weight.dtype", "h.double().dtype", "(h > 0).dtype", "h.argmax(-1).dtype")
OF_DTYPES = (
    "{s} is torch.float32", "{s} == torch.float32", "{s} != torch.float32", "{s} in (torch.float32, torch.float16)", "not {s} is torch.bool",
    "str({s}) == 'torch.float32'", "'float32' in str({s})", "f'{{{s}}}'.endswith('32')", "'{{}}'.format({s}) == 'torch.float32'",
    "{s}.is_floating_point", "{s}.itemsize == 4", "{{torch.float32: True}}.get({s}, False)", "{s} in {{torch.float32}}", "{s} is x.dtype",
    "torch.finfo(torch.float32 if {s}.is_complex else {s}).bits == 32", "isinstance({s}, torch.dtype)", "{s}.is_complex", "{s} == x.dtype",
    "repr({s}) == 'torch.float32'", "hash({s}) == hash(torch.float32)", "hasattr({s}, '{name}')", "type({s}) is torch.dtype",
    "'%s' % {s} == 'torch.float32'", "str({s}).split('.')[-1] == 'float32'", "{s}.to_complex() is torch.complex64", "{s}.is_signed",
    "torch.promote_types({s}, torch.float16) is torch.float32", "(torch.float32, torch.float64).index({s}) == 0", "{s} is None",
)  # fmt: skip
DEVICES = ("h.device", "x.device", "self.first.weight.device", "torch.zeros(1).device")
OF_DEVICES = (
    "{s}.type == 'cpu'", "str({s}) == 'cpu'", "f'{{{s}}}' == 'cpu'", "{s} == torch.device('cpu')", "{s}.index is None", "{s} == x.device",
    "isinstance({s}, torch.device)", "hasattr({s}, '{name}')", "'cuda' in str({s})", "{s}.type in ('cuda', 'mps')", "repr({s})[:6] == 'device'",
    "{s} in (torch.device('cpu'),)", "{{'cpu': True}}.get({s}.type, False)", "{s}.type.startswith('c')", "type({s}) is torch.device",
    "{s} != torch.device('cpu')", "hash({s}) == hash(torch.device('cpu'))", "{{torch.device('cpu'): True}}.get({s}, False)",
)  # fmt: skip
NUMBERS = ("h.shape[0]", "x.size(-1)", "len(h)", "h.dim()", "x.shape[1]", "h.numel()", "h.stride(0)", "x.size()[0]", "h.ndim")
OF_NUMBERS = (
    "{s} == 3", "{s} == 4", "isinstance({s}, int)", "type({s}) is int", "{s} % 2 == 1", "{s} in (3, 4)", "int({s}) == 3", "str({s}) == '3'",
    "f'{{{s}}}' == '4'", "({s}).bit_length() == 2", "sum(range({s})) == 3", "float({s}) == 3.0", "bool({s})", "min({s}, 3) == 3",
    "len([0] * {s}) == 3", "round({s} / 2) == 2", "divmod({s}, 2) == (1, 1)", "isinstance({s}, numbers.Integral)", "operator.index({s}) == 3",
    "{s} // 2 == 1", "{s} ** 2 == 9", "-{s} < -3", "{{3: True, 4: False}}.get({s}, False)", "1 < {s} < 4", "isinstance({s}, {type})",
    "hash({s}) == hash(3)", "math.sqrt({s}) > 1.8", "math.log2({s}) == 2", "np.sqrt({s}) == 2", "'%d' % {s} == '3'", "list(range(9))[{s}] == 3",
    "not {s}", "{s} is None", "max(1, {s}) == 4", "torch.arange({s}).numel() == 3", "abs({s}) == 3", "{s} & 1 == 1", "[*range({s})][-1] == 2",
)  # fmt: skip
WORLD = ("self", "self.first", "nn.Module")
OF_WORLD = (
    "self.training", "hasattr(self, '{name}')", "hasattr(self.first, '{name}')", "isinstance(self.first, nn.Linear)", "self.first.bias is None",
    "type(self.first) is nn.Linear", "type(self).__name__ == 'Net'", "isinstance(self, Net)", "len(list(self.parameters())) == 4",
    "next(self.parameters()).dtype is torch.float32", "'first' in dict(self.named_modules())", "callable(self.first)", "callable(self)",
    "torch.is_grad_enabled()", "torch.jit.is_scripting()", "torch.compiler.is_compiling()", "torch.jit.is_tracing()", "self.first is self.last",
    "torch.is_inference_mode_enabled()", "torch.is_autocast_enabled()", "len(self._forward_hooks) == 0", "self.first.in_features == 4",
    "self.first.weight is self.last.weight", "'first' in self._modules", "torch.get_default_dtype() is torch.float32", "self is None",
    "self.first.weight.requires_grad", "getattr(self, '{name}', None) is None", "torch.overrides.has_torch_function((x, h))",
    "torch.overrides.has_torch_function_unary(h)", "torch._C._get_tracing_state() is None", "x.is_leaf and not h.is_leaf", "self.__class__ is Net",
    "issubclass(type(self), Net)", "'{name}' in dir(self)", "list(vars(self))[0] == 'training'", "len(self.state_dict()) == 4",
)  # fmt: skip
SUBJECTS = (
    (TENSORS, OF_TENSORS, 8.0), (SIZES, OF_SIZES, 3.0), (DTYPES, OF_DTYPES, 3.0), (DEVICES, OF_DEVICES, 2.0), (NUMBERS, OF_NUMBERS, 3.0),
    (WORLD, OF_WORLD, 2.0),
)  # fmt: skip
USES = (
    "h = h * 2.0 if {q} else h + 1.0", "h = h * 2.0 if {q} else h + 1.0", "if {q}:\n    h = h * 2.0\nelse:\n    h = h + 1.0",
    "if not ({q}):\n    h = h - 1.0", "h = [h + 1.0, h * 2.0][bool({q})]", "h = h + float(bool({q}))", "h = h * (1.0 + ({q}))",
    "match bool({q}):\n    case True:\n        h = h * 2.0\n    case _:\n        h = h + 1.0", "h = ({q}) and h * 2.0 or h",
    "k = 0\nwhile ({q}) and k < 2:\n    h, k = h * 1.5, k + 1", "h = h * 3.0 if any([{q}]) else h", "h = h * {{True: 2.0, False: 0.5}}[bool({q})]",
    "try:\n    factor = 3.0 if {q} else 1.0\nexcept (AttributeError, TypeError, ValueError, RuntimeError):\n    factor = 0.25\nh = h * factor",
    "assert ({q}) in (True, False)\nh = h * 2.0", "h = h * (2.0 if str(bool({q})) == 'True' else 0.5)", "h = h + sum(1.0 for _ in (0,) if {q})",
    "answer = {q}\nh = h * 2.0 if answer else h + 1.0", "h = torch.relu(h) if ({q}) is True else torch.tanh(h)",
)  # fmt: skip


@drawn("asks", 8.0)
def question(rng: random.Random, n: int) -> Fragment:
    subjects, questions, _ = rng.choices(SUBJECTS, [weight for _, _, weight in SUBJECTS])[0]
    name = rng.choice(NAMES if rng.random() < 0.5 else TENSOR_NAMES)
    asked = rng.choice(questions).format(s=rng.choice(subjects), name=name, type=rng.choice(TYPES))
    return Fragment(rng.choice(USES).format(q=asked))


MATCHED = (
    "x", "h", "x.shape", "(x, h)", "[x, h]", "{{'q': x, 'k': h}}", "h.dtype", "x.dim()", "len(x)", "x.device.type", "h.shape[0]", "None",
    "(x.shape, h)", "self.training", "x.unbind()", "x.split(1)",
)  # fmt: skip
CASES = (
    "[a, b]", "[a, b, c]", "[a, *b]", "(3, 4)", "(3, n)", "{{'q': q}}", "{{'q': q, **rest}}", "torch.Tensor()", "torch.float32", "int()", "3",
    "2", "'cpu'", "str()", "tuple()", "list()", "[]", "None", "True", "False", "torch.Tensor(ndim=2)", "object(shape=(3, 4))", "[[a, b], c]",
    "torch.Size()", "nn.Parameter()", "torch.Tensor(requires_grad=True)",
)  # fmt: skip


@drawn("asks", 1.5)
def matching(rng: random.Random, n: int) -> Fragment:
    cases = rng.sample(CASES, rng.choice((1, 2, 3)))
    lines = [f"    case {case.format()}:\n        h = h * {1.5 + i}" for i, case in enumerate(cases)]
    return Fragment("\n".join([f"match {rng.choice(MATCHED).format()}:", *lines, "    case _:\n        h = h + 1.0"]))


TRIED = (
    "x.foo", "x.shape[5]", "n, c, t = x.shape", "n, c = x.shape", "a, b = x", "a, b, c = x", "len(x.foo)", "x.keys()", "int(x.shape)", "iter(x)",
    "next(x)", "x['q']", "x()", "x.shape = 1", "float(x.device)", "x.dtype + 1", "dict(x)", "hash(x.shape)", "x.shape.foo", "x[5]", "x[:, 9]",
    "x.view(5, 5)", "x @ x", "assert x.dim() == 3", "assert x.dtype is torch.float32", "self.foo", "del x.foo", "x.bias.data", "raise KeyError",
    "x.shape.index(9)", "list(x.shape).index(9)", "torch.cat([x, x[0]])", "x.size(4)", "self.first(x.T)", "set(x.shape)", "operator.index(x)",
    "x.squeeze().logits", "(h > 0).item()", "x.numpy()", "np.asarray(x)", "memoryview(x)", "len(x.dtype)", "len(x.sum())", "str(x) + 1",
)  # fmt: skip
ERRORS = ("AttributeError", "Exception", "(AttributeError, TypeError)", "ValueError", "(IndexError, RuntimeError)", "(KeyError, ValueError)")


@drawn("asks", 2.5)
def attempt(rng: random.Random, n: int) -> Fragment:
    tried, error = rng.choice(TRIED), rng.choice(ERRORS)
    if tried == "next(x)":
        error = "Exception"
    return Fragment(f"try:\n    {tried}\n    h = h * 2.0\nexcept {error}:\n    h = h + 1.0\nelse:\n    h = h * 0.5")


ROWS = (
    "a, b, c = {s}\nh = h + a * c", "a, *b = {s}\nh = h + a * float(len(b))", "for row in {s}:\n    h = h + row.mean()",
    "for i, row in enumerate({s}):\n    h = h + i * row", "h = h + sum(row.mean() * k for k, row in zip((1.0, 2.0, 3.0, 4.0), {s}))",
    "rows = list({s})\nh = h + rows[-1] * float(len(rows))", "rows = [row * 2.0 for row in {s}]\nh = h + rows[0]", "h = h + max({s}, key=id).sum() * 0",
    "(a, b, c), d = {s}, 2.0\nh = h + b * d", "for one, other in zip({s}, {s}):\n    h = h + one * other", "h = torch.stack([*{s}][:3]) + h",
    "rows = iter({s})\nh = h + next(rows) * 2.0", "h = h + {{i: row for i, row in enumerate({s})}}[2]", "a, b, c = map(torch.tanh, {s})\nh = h + c",
    "h = h + functools.reduce(torch.add, {s})", "h = h + len(tuple({s}))", "h = h + [*reversed([*{s}])][0]", "h = h + dict(zip('abc', {s}))['b']",
)  # fmt: skip


@drawn("asks", 1.5)
def rows(rng: random.Random, n: int) -> Fragment:
    return Fragment(rng.choice(ROWS).format(s=rng.choice(("x", "h", "x", "x.unbind()", "h.unbind(0)", "x.split(1)", "x.chunk(3)"))))


DEFAULTS = (
    ("extra{n}: dict = {{}}", "h = h * (2.0 if not extra{n} else 0.5)"), ("extra{n}=()", "h = h * (1.0 + len(extra{n}))"),
    ("extra{n}=[]", "h = h * 2.0 if extra{n} == [] else h"), ("act{n}=torch.relu", "h = act{n}(h - 0.5)"), ("act{n}=F.gelu", "h = act{n}(h)"),
    ("kind{n}=torch.float32", "h = h.to(kind{n})"), ("where{n}=torch.device('cpu')", "h = h.to(where{n})"), ("size{n}=torch.Size([3, 4])", "h = h.reshape(size{n})"),
    ("pair{n}=Pair(1.0, 2.0)", "h = h * pair{n}.other"), ("flag{n}=...", "h = h * 2.0 if flag{n} is ... else h"), ("part{n}=slice(0, 2)", "h = h + h[part{n}].sum(0)"),
    ("more{n}=SimpleNamespace(scale=3.0)", "h = h * more{n}.scale"), ("name{n}='mean'", "h = h - getattr(torch, name{n})(h)"),
    ("made{n}=nn.ReLU", "h = made{n}()(h - 0.5)"), ("ids{n}=range(3)", "h = h + sum(ids{n})"), ("big{n}=float('inf')", "h = h.clamp(max=big{n})"),
    ("lots{n}=frozenset({{1, 2}})", "h = h * len(lots{n})"), ("table{n}={{'a': 2.0}}", "h = h * table{n}.get('a', 1.0)"), ("at{n}=np.float64(2.0)", "h = h * at{n}"),
    ("fn{n}=lambda t: t * 2.0", "h = fn{n}(h)"), ("fn{n}=functools.partial(torch.mul, other=3.0)", "h = fn{n}(h)"), ("t{n}=torch.ones(4)", "h = h + t{n}"),
    ("**more", "h = h * 2.0 if not more else h"), ("*rest", "h = h * (2.0 + len(rest))"), ("ell{n}: 'Tensor | None' = None", "h = h if ell{n} is None else h * ell{n}"),
)  # fmt: skip


@drawn("asks", 1.0)
def default(rng: random.Random, n: int) -> Fragment:
    takes, text = rng.choice(DEFAULTS)
    return Fragment(text.format(n=n), takes=takes.format(n=n))
