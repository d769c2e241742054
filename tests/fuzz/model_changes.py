"""Models that change between calls: attributes set later, tied weights, replaced buffers, containers that grow."""

from __future__ import annotations

import random

from fuzz.scenes import Fragment, drawn

HEAD = """\
class Part(nn.Module):
    factor = 2.0

    def __init__(self, factor=None):
        super().__init__()
        if factor is not None:
            self.factor = factor
        self.inner = nn.Linear(4, 4)
        self.register_parameter("shift", None)
        self.register_buffer("table", None)

    def forward(self, h):
        h = self.inner(h) * self.factor
        h = h if self.shift is None else h + self.shift
        return h if self.table is None else h * self.table

    def scaled(self, h):
        return h * self.factor

    @property
    def doubled(self):
        return self.factor * 2.0


class Other(Part):
    def forward(self, h):
        return self.scaled(h) - 1.0

    def scaled(self, h):
        return h * 5.0


class Slots:
    __slots__ = ("scale", "more")

    def __init__(self, scale):
        self.scale = scale


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    sizes: list = dataclasses.field(default_factory=lambda: [1, 2])


class Mapping(dict):
    pass


class Listing(list):
    pass


def tripled(self, h):
    return h * 3.0"""

# (lines of __init__, lines of the forward, methods, what may be done between calls): {n} is the fragment's number.
CHANGES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "",
        "h = h * getattr(self, 'scale{n}', 1.0)",
        "",
        ("net.scale{n} = 3.0", "net.scale{n} = 0.5", "net.__dict__.pop('scale{n}', None)", "net.scale{n} = torch.ones(4) * 2.0"),
    ),
    (
        "",
        "h = h * 2.0 if hasattr(self, 'flag{n}') else h + 1.0",
        "",
        ("net.flag{n} = None", "net.__dict__.pop('flag{n}', None)", "net.register_buffer('flag{n}', None)"),
    ),
    (
        "",
        "h = h + (0.0 if getattr(self, 'bias{n}', None) is None else self.bias{n})",
        "",
        ("net.bias{n} = nn.Parameter(torch.ones(4))", "net.register_buffer('bias{n}', torch.ones(4))", "net.bias{n} = None"),
    ),
    (
        "self.scale{n} = 2.0",
        "h = h * self.scale{n}",
        "",
        ("net.scale{n} = 3.0", "net.scale{n} = torch.tensor(2.5)", "net.scale{n} = 1", "net.scale{n} = True", "del net.scale{n}"),
    ),
    ("self.sign{n} = 0.0", "h = h + math.copysign(1.0, self.sign{n})", "", ("net.sign{n} = -0.0", "net.sign{n} = 0.0", "net.sign{n} = 1")),
    ("self.one{n} = 1", "h = h * (2.0 if self.one{n} is True else 0.5)", "", ("net.one{n} = True", "net.one{n} = 1", "net.one{n} = 1.0")),
    (
        "",
        "h = self.act{n}(h)",
        "def act{n}(self, h):\n    return h * 2.0",
        (
            "net.act{n} = lambda h: h * 3.0",
            "net.act{n} = torch.tanh",
            "net.act{n} = nn.Tanh()",
            "net.act{n} = MethodType(tripled, net)",
            "Net.act{n} = tripled",
        ),
    ),
    (
        "self.part{n} = Part()",
        "h = self.part{n}(h)",
        "",
        (
            "net.part{n} = Part(3.0)",
            "net.part{n}.factor = 3.0",
            "net.part{n}.__class__ = Other",
            "net.part{n}.forward = MethodType(tripled, net.part{n})",
            "net.part{n} = nn.Identity()",
            "Part.factor = 4.0",
            "del net.part{n}.inner",
        ),
    ),
    (
        "self.part{n} = Part()",
        "h = self.part{n}(h)",
        "",
        (
            "net.part{n}.shift = nn.Parameter(torch.ones(4))",
            "net.part{n}.table = torch.arange(4.0)",
            "net.part{n}.shift = None",
            "net.part{n}.table = None",
            "net.part{n}.table = torch.ones(3, 4)",
        ),
    ),
    (
        "self.part{n} = Part()",
        "h = self.part{n}.scaled(h)",
        "",
        (
            "net.part{n}.factor = 3.0",
            "net.part{n}.__class__ = Other",
            "net.part{n}.scaled = lambda h: h * 7.0",
            "Part.scaled = tripled",
            "net.part{n} = Part(5.0)",
        ),
    ),
    (
        "self.part{n} = Part()",
        "h = h * self.part{n}.doubled",
        "",
        ("net.part{n}.factor = 3.0", "Part.doubled = property(lambda self: 9.0)", "Part.factor = 4.0", "net.part{n} = Part(5.0)"),
    ),
    (
        "self.part{n} = Part()",
        "h = self.part{n}(h)",
        "",
        (
            "Part.forward = tripled",
            "net.part{n}.inner.bias = None",
            "net.part{n}.inner.weight = nn.Parameter(torch.ones(4, 4))",
            "net.part{n}.inner = nn.Linear(4, 4, bias=False)",
            "setattr(net.part{n}, 'inner', nn.Sequential(nn.Linear(4, 4), nn.Tanh()))",
        ),
    ),
    (
        "self.drop{n} = nn.Dropout(0.0)",
        "h = self.drop{n}(h * (1.0 + self.drop{n}.p))",
        "",
        (
            "net.drop{n} = nn.Identity(); net.drop{n}.p = 0.5",
            "net.drop{n}.p = 1.0",
            "net.drop{n}.inplace = True",
            "net.drop{n}.train(False); net.drop{n}.p = 0.5",
        ),
    ),
    (
        "self.act{n} = nn.LeakyReLU(0.1)",
        "h = self.act{n}(h - 0.5)",
        "",
        (
            "net.act{n}.negative_slope = 0.9",
            "net.act{n} = nn.ReLU()",
            "net.act{n}.inplace = True",
            "net.act{n} = torch.tanh if False else nn.Tanh()",
        ),
    ),
    (
        "self.norm{n} = nn.BatchNorm1d(4)",
        "h = self.norm{n}(h)",
        "",
        (
            "net.norm{n}.eval()",
            "net.norm{n}.momentum = 0.5",
            "net.norm{n}.eps = 1.0",
            "net.norm{n}.running_mean = torch.ones(4)",
            "net.norm{n} = nn.LayerNorm(4)",
            "net.norm{n}.track_running_stats = False",
            "net.norm{n}.running_mean = net.norm{n}.running_var = None",
        ),
    ),
    (
        "self.register_buffer('buf{n}', torch.ones(4))",
        "h = h * self.buf{n}",
        "",
        (
            "net.buf{n} = torch.arange(4.0)",
            "net.buf{n} = torch.ones(3, 4) * 2.0",
            "net.buf{n}.mul_(2.0)",
            "net.buf{n} = torch.ones(4, dtype=torch.float64)",
            "del net.buf{n}",
            "net.buf{n} = torch.ones(4) > 0",
            "net.buf{n} = nn.Buffer(torch.ones(4))",
            "net.register_buffer('buf{n}', torch.tensor(3.0), persistent=False)",
        ),
    ),
    (
        "self.register_buffer('buf{n}', None)",
        "h = h if self.buf{n} is None else h * self.buf{n}",
        "",
        ("net.buf{n} = torch.arange(4.0)", "net.buf{n} = None", "net.buf{n} = torch.tensor(2)"),
    ),
    (
        "self.register_parameter('par{n}', None)",
        "h = h if self.par{n} is None else h * self.par{n}",
        "",
        ("net.par{n} = nn.Parameter(torch.arange(4.0))", "net.par{n} = None"),
    ),
    (
        "self.plain{n} = torch.ones(4)",
        "h = h * self.plain{n}",
        "",
        (
            "net.plain{n} = torch.arange(4.0)",
            "net.plain{n}.mul_(2.0)",
            "net.plain{n} = 2.0",
            "net.plain{n} = nn.Parameter(torch.ones(4) * 3.0)",
        ),
    ),
    (
        "self.list{n} = nn.ModuleList()",
        "for each in self.list{n}:\n    h = each(h)",
        "",
        (
            "net.list{n}.append(nn.Tanh())",
            "net.list{n}.append(nn.Linear(4, 4))",
            "net.list{n}.extend([nn.ReLU(), nn.Tanh()])",
            "net.list{n}.insert(0, nn.Sigmoid())",
            "del net.list{n}[:1]",
            "net.list{n} = nn.ModuleList([nn.Tanh()])",
        ),
    ),
    (
        "self.list{n} = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])",
        "for each in self.list{n}:\n    h = each(h)",
        "",
        (
            "net.list{n}.append(nn.Linear(4, 4))",
            "del net.list{n}[0]",
            "net.list{n}[0] = nn.Identity()",
            "net.list{n}[0], net.list{n}[1] = net.list{n}[1], net.list{n}[0]",
            "net.list{n}.pop(1)",
        ),
    ),
    (
        "self.pars{n} = nn.ParameterList()",
        "for each in self.pars{n}:\n    h = h * each",
        "",
        (
            "net.pars{n}.append(nn.Parameter(torch.arange(4.0)))",
            "net.pars{n}.append(torch.ones(4) * 2.0)",
            "net.pars{n} = nn.ParameterList([torch.ones(4)])",
        ),
    ),
    (
        "self.table{n} = nn.ParameterDict()",
        "for key, each in self.table{n}.items():\n    h = h * 1.5 + each",
        "",
        (
            "net.table{n}['a'] = nn.Parameter(torch.arange(4.0))",
            "net.table{n}['b'] = nn.Parameter(torch.ones(4))",
            "net.table{n}['c'] = 2.0",
            "net.table{n}.clear()",
        ),
    ),
    (
        "self.heads{n} = nn.ModuleDict()",
        "h = self.heads{n}['a'](h) if 'a' in self.heads{n} else h * 2.0",
        "",
        ("net.heads{n}['a'] = nn.Linear(4, 4)", "net.heads{n}['a'] = nn.Tanh()", "net.heads{n}.clear()", "net.heads{n}['b'] = nn.Tanh()"),
    ),
    (
        "self.seq{n} = nn.Sequential(nn.Linear(4, 4))",
        "h = self.seq{n}(h)",
        "",
        (
            "net.seq{n}.append(nn.Tanh())",
            "net.seq{n}[0] = nn.Linear(4, 4)",
            "net.seq{n}.insert(0, nn.ReLU())",
            "net.seq{n}.add_module('tail', nn.Linear(4, 4))",
            "del net.seq{n}[0]",
            "net.seq{n} = nn.Sequential()",
        ),
    ),
    (
        "self.weight{n} = nn.Parameter(torch.arange(4.0))",
        "h = h + sum(p.sum() for name, p in self.named_parameters() if name.startswith('w'))",
        "",
        (
            "net.register_parameter('wide{n}', net._parameters.pop('weight{n}'))",
            "net.weights{n} = nn.Parameter(torch.ones(4))",
            "del net.weight{n}",
            "net.weight{n} = nn.Parameter(torch.ones(2))",
        ),
    ),
    (
        "self.a{n}, self.b{n} = nn.Linear(4, 4), nn.Linear(4, 4)",
        "h = self.b{n}(torch.tanh(self.a{n}(h)))",
        "",
        (
            "net.b{n}.weight = net.a{n}.weight",
            "net.b{n}.weight = nn.Parameter(net.a{n}.weight.detach().clone())",
            "net.load_state_dict({{k: v.clone() for k, v in net.state_dict().items()}}, assign=True)",
            "net.b{n}.weight = nn.Parameter(torch.ones(4, 4))",
        ),
    ),
    (
        "self.a{n}, self.b{n} = nn.Linear(4, 4), nn.Linear(4, 4)\nself.b{n}.weight = self.a{n}.weight",
        "h = self.b{n}(torch.tanh(self.a{n}(h)))",
        "",
        (
            "net.b{n}.weight = nn.Parameter(net.a{n}.weight.detach().clone())",
            "net.b{n}.weight = net.last.weight",
            "net.b{n}.weight = nn.Parameter(torch.ones(4, 4))",
            "net.load_state_dict({{k: v.clone() for k, v in net.state_dict().items()}}, assign=True); net.b{n}.weight = net.a{n}.weight",
        ),
    ),
    (
        "self.a{n}, self.b{n} = nn.Linear(4, 4), nn.Linear(4, 4)",
        "h = self.b{n}(self.a{n}(h))",
        "",
        ("net.b{n} = net.a{n}", "net.a{n}, net.b{n} = net.b{n}, net.a{n}", "net.b{n}.weight.data = net.a{n}.weight.data.clone()"),
    ),
    (
        "self.lin{n} = nn.Linear(4, 4)",
        "h = self.lin{n}(h)",
        "",
        (
            "prune.l1_unstructured(net.lin{n}, 'weight', amount=3)",
            "prune.is_pruned(net.lin{n}) and prune.remove(net.lin{n}, 'weight')",
            "parametrizations.weight_norm(net.lin{n})",
            "parametrize.is_parametrized(net.lin{n}) and parametrize.remove_parametrizations(net.lin{n}, 'weight')",
            "parametrizations.orthogonal(net.lin{n})",
        ),
    ),
    (
        "self.lin{n} = nn.Linear(4, 4)",
        "h = self.lin{n}(h)",
        "",
        (
            "net.lin{n}.register_forward_hook(lambda m, given, out: out * 2.0)",
            "net.lin{n}.register_forward_pre_hook(lambda m, given: (given[0] + 1.0,))",
            "net.lin{n}._forward_hooks.clear()",
            "net.register_forward_pre_hook(lambda m, given, more: None, with_kwargs=True)",
            # with penalties="return" the model returns a pair
            "net.register_forward_hook(lambda m, given, out: (out[0] * 3.0, out[1]) if isinstance(out, tuple) else out * 3.0)",
        ),
    ),
    (
        "self.lin{n} = nn.Linear(4, 4)",
        "h = self.lin{n}(h)",
        "",
        (
            "net.lin{n}.weight.requires_grad_(False)",
            "net.lin{n}.bias = None",
            "net.lin{n}.weight.data = torch.ones(4, 4)",
            "net.lin{n} = torch.compile(net.lin{n}, backend='eager')",
            "net.lin{n}.compile(backend='eager')",
            "net.lin{n} = nn.Linear(4, 4)",
            "net.lin{n}.weight.data.mul_(2.0)",
        ),
    ),
    (
        "self.config{n} = SimpleNamespace(scale=2.0)",
        "h = h * self.config{n}.scale * getattr(self.config{n}, 'more', 1.0)",
        "",
        ("net.config{n}.scale = 3.0", "net.config{n}.more = 5.0", "net.config{n} = SimpleNamespace(scale=7.0)"),
    ),
    (
        "self.config{n} = argparse.Namespace(scale=2.0)",
        "h = h * self.config{n}.scale * (5.0 if 'more' in self.config{n} else 1.0)",
        "",
        ("net.config{n}.scale = 3.0", "net.config{n}.more = 5.0", "vars(net.config{n}).update(scale=4.0)"),
    ),
    (
        "self.config{n} = Slots(2.0)",
        "h = h * self.config{n}.scale * (5.0 if hasattr(self.config{n}, 'more') else 1.0)",
        "",
        ("net.config{n}.scale = 3.0", "net.config{n}.more = 5.0"),
    ),
    (
        "self.config{n} = Config()",
        "h = h * self.config{n}.scale * sum(self.config{n}.sizes)",
        "",
        (
            "net.config{n}.scale = 3.0",
            "net.config{n}.sizes.append(5)",
            "net.config{n}.sizes[0] = 9",
            "Config.scale = 6.0",
            "net.config{n} = Config(4.0)",
        ),
    ),
    (
        "self.table{n} = Mapping(a=2.0)",
        "h = h * self.table{n}['a'] * self.table{n}.get('b', 1.0)",
        "",
        ("net.table{n}['a'] = 3.0", "net.table{n}['b'] = 5.0", "net.table{n}.clear()"),
    ),
    (
        "self.table{n} = {{'a': {{'b': [1.0, 2.0]}}}}",
        "h = h * sum(self.table{n}['a']['b']) * len(self.table{n})",
        "",
        (
            "net.table{n}['a']['b'].append(5.0)",
            "net.table{n}['a']['b'][0] = 9.0",
            "net.table{n}['c'] = 1",
            "net.table{n}['a'] = {{'b': (4.0,)}}",
        ),
    ),
    (
        "self.table{n} = defaultdict(lambda: 2.0)",
        "h = h * self.table{n}['a']",
        "",
        ("net.table{n}['a'] = 3.0", "net.table{n}.clear()"),
    ),
    (
        "self.table{n} = defaultdict(lambda: 2.0)",
        "h = h * (self.table{n}['a'] if 'a' in self.table{n} else self.table{n}.default_factory())",
        "",
        ("net.table{n}['a'] = 3.0", "net.table{n}.default_factory = lambda: 7.0", "net.table{n}.clear()"),
    ),
    (
        "self.count{n} = Counter(a=2)",
        "h = h * self.count{n}['a'] + self.count{n}['b']",
        "",
        ("net.count{n}['a'] += 1", "net.count{n}['b'] = 3", "net.count{n}.update('ab')"),
    ),
    (
        "self.many{n} = Listing([1.0, 2.0])",
        "h = h * sum(self.many{n})",
        "",
        ("net.many{n}.append(3.0)", "net.many{n}[1] = 9.0", "net.many{n} = [4.0]"),
    ),
    (
        "self.many{n} = list(range(3000))",
        "h = h * (1.0 + self.many{n}[2500] / 2500)",
        "",
        ("net.many{n}[2500] = 0", "net.many{n}.insert(0, 7)", "net.many{n} = [1] * 3000"),
    ),
    (
        "self.many{n} = deque([1.0, 2.0])",
        "h = h * self.many{n}[-1]",
        "",
        ("net.many{n}.append(3.0)", "net.many{n}.rotate()", "net.many{n}[-1] = 5.0"),
    ),
    (
        "self.ids{n} = {{1, 2}}",
        "h = h * sum(self.ids{n})",
        "",
        ("net.ids{n}.add(5)", "net.ids{n}.discard(1)", "net.ids{n} = frozenset({{9}})"),
    ),
    (
        "self.arr{n} = np.array([1.0, 2.0, 3.0, 4.0])",
        "h = h * float(self.arr{n}[1])",
        "",
        ("net.arr{n}[1] = 7.0", "net.arr{n} = np.ones(4)", "net.arr{n} *= 2.0"),
    ),
    (
        "self.arr{n} = np.ones(4, dtype=np.float32)",
        "h = h * torch.as_tensor(self.arr{n})",
        "",
        ("net.arr{n}[1] = 7.0", "net.arr{n} = np.full(4, 2.0, dtype=np.float32)"),
    ),
    (
        "self.fn{n} = functools.partial(torch.mul, other=2.0)",
        "h = self.fn{n}(h)",
        "",
        ("net.fn{n} = functools.partial(torch.mul, other=3.0)", "net.fn{n}.keywords['other'] = 5.0", "net.fn{n} = torch.tanh"),
    ),
    (
        "self.fn{n} = lambda h, k=2.0: h * k",
        "h = self.fn{n}(h)",
        "",
        ("net.fn{n}.__defaults__ = (3.0,)", "net.fn{n} = lambda h: h * 4.0", "net.fn{n}.__code__ = (lambda h, k=2.0: h * 5.0).__code__"),
    ),
    (
        "self.parts{n} = [nn.Linear(4, 4), nn.Tanh()]",
        "for each in self.parts{n}[1:]:\n    h = each(h)",
        "",
        ("net.parts{n}.append(nn.Sigmoid())", "net.parts{n}[1] = nn.ReLU()", "net.parts{n}.reverse()"),
    ),
    ("self.kind{n} = torch.float64", "h = h.to(self.kind{n}).float()", "", ("net.kind{n} = torch.float16", "net.kind{n} = torch.int64")),
    (
        "self.mode{n} = 'mean'",
        "h = h - getattr(h, self.mode{n})()",
        "",
        ("net.mode{n} = 'sum'", "net.mode{n} = 'amax'", "net.mode{n} = None"),
    ),
    ("", "h = h * GLOBAL['scale{n}'] if 'scale{n}' in GLOBAL else h", "", ("GLOBAL['scale{n}'] = 3.0", "GLOBAL.clear()")),
    ("", "h = h * SCALE", "", ("globals()['SCALE'] = 3.0", "globals()['SCALE'] = 0.5")),
    (
        "self.a{n}, self.b{n} = [1.0], [1.0]",
        "h = h * (2.0 if self.a{n} is self.b{n} else 0.5)",
        "",
        ("net.b{n} = net.a{n}", "net.b{n} = [1.0]"),
    ),
    (
        "self.child{n} = None",
        "h = h if self.child{n} is None else self.child{n}(h)",
        "",
        ("net.child{n} = nn.Tanh()", "net.child{n} = torch.tanh", "net.child{n} = None", "net.child{n} = Part()"),
    ),
    (
        "self.lin{n} = nn.Linear(4, 4)",
        "h = self.lin{n}(h)",
        "",
        (
            "net.lin{n}.forward = lambda h: h * 2.0",
            "net.lin{n}.__dict__.pop('forward', None)",
            "net.lin{n}.__class__ = type('Lin', (nn.Linear,), dict(forward=tripled))",
            "net.lin{n}.in_features = 3",
        ),
    ),
)
TIES = {26, 27, 28}


@drawn("changes", 8.0)
def changed(rng: random.Random, n: int) -> Fragment:
    made, text, methods, changes = rng.choices(CHANGES, [3.0 if i in TIES else 1.0 for i in range(len(CHANGES))])[0]
    head = HEAD + "\n\n\nGLOBAL = {}\nSCALE = 2.0"
    return Fragment(text.format(n=n), made.format(n=n), methods.format(n=n), head, changes=[each.format(n=n) for each in changes])


# (lines of __init__, lines of the forward, the attributes that it assigns)
ASSIGNED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("", "self.latest{n} = h", ("latest{n}",)),
    ("self.calls{n} = 0", "self.calls{n} += 1", ("calls{n}",)),
    ("self.calls{n} = 0", "h = h * (1.0 + self.calls{n})\nself.calls{n} += 1", ("calls{n}",)),
    ("self.sizes{n} = []", "self.sizes{n}.append(len(x))", ("sizes{n}",)),
    ("self.seen{n} = {{}}", "self.seen{n}['last'] = h.detach()", ("seen{n}",)),
    ("self.first{n} = True", "if self.first{n}:\n    h = h * 2.0\n    self.first{n} = False", ("first{n}",)),
    ("self.part{n} = nn.Identity()", "self.part{n}.shape = tuple(h.shape)\nh = self.part{n}(h)", ()),
    ("", "h = h * (2.0 if hasattr(self, 'ran{n}') else 0.5)\nself.ran{n} = True", ("ran{n}",)),
    ("self.cache{n} = None", "if self.cache{n} is None:\n    self.cache{n} = torch.ones(4) * 2.0\nh = h * self.cache{n}", ("cache{n}",)),
    ("self.register_buffer('steps{n}', torch.zeros(()))", "self.steps{n} += 1\nh = h * self.steps{n}", ()),
    ("self.register_buffer('steps{n}', torch.zeros(()))", "self.steps{n} = self.steps{n} + 1\nh = h * self.steps{n}", ()),
)


@drawn("changes", 1.5)
def assigned(rng: random.Random, n: int) -> Fragment:
    made, text, watched = rng.choice(ASSIGNED)
    return Fragment(text.format(n=n), made.format(n=n), watched=[each.format(n=n) for each in watched])
