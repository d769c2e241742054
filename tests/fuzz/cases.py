"""A program made into cases: plain data, its source and that of the oracle included, so that one can be written down and replayed."""

from __future__ import annotations

import copy
import linecache
import random
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import axes as axes_of
from fuzz import catalogue, variants
from fuzz.choices import KEYS, ON_READS, SPLICES, STATEFUL, Found, Known, Reg, found, named, regularizers
from fuzz.generate import generate
from fuzz.matching import Name, Place, select
from fuzz.names import Table, table
from fuzz.oracle import Later, Run, instrumented
from fuzz.program import DROPOUT, PRODUCT, Flattener, Plain, Program
from fuzz.reading import chains
from fuzz.settled import WrittenInBranch, settle
from fuzz.strengths import Strengths


@dataclass
class Case:
    """One set of regularizers on a model. ``own``: what should become of the model's dropouts, by site."""

    regs: list[Reg]
    oracle: str
    found: list[Found]
    penalties: str = "return"
    scale: float = 1.0
    own_dropout: Any = "keep"
    own: dict[str, float] = field(default_factory=dict)
    own_sites: list[str] = field(default_factory=list)
    rng: int = 0
    stripped: bool = False
    later: bool = False  # of the regularizers and options of 0.2
    moves: bool = False  # whether the parameters change between calls
    depth: dict[str, dict[str, float]] = field(default_factory=dict)  # strengths by depth, by name and site
    changes: list[list[Any]] = field(default_factory=list)  # [call, name, what is set, by site]
    keywords: bool = False  # whether the regularizers are made by keywords
    blocks: str = ""  # what blocks= is given

    def strengths(self) -> Strengths:
        return Strengths(dict(zip(self.names, (reg.weight for reg in self.regs), strict=True)), self.depth, self.changes)

    @property
    def names(self) -> list[str]:
        return named(self.regs)


@dataclass
class Group:
    """A model and the cases on it. ``sites``: the names that can be selected; ``others``: of tuples, masks and sizes."""

    seed: int
    source: str
    sites: list[str]
    others: list[str]
    cases: list[Case]
    input_grads: bool = True
    sized: bool = True
    front_end: str = "symbolic"
    two_modes: bool = False
    writes: bool = False
    random: bool = False
    apart: bool = False

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for case, own in zip(data["cases"], self.cases, strict=True):
            for each, plain in zip(case["found"], own.found, strict=True):
                each["unsure"] = sorted(plain.unsure)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Group:
        cases = []
        for case in data["cases"]:
            regs = [Reg(r["kind"], tuple(r["pattern"]), r["weight"], r["options"]) for r in case["regs"]]
            sites = [Found(f["sites"], f["empty"], set(f["unsure"])) for f in case["found"]]
            cases.append(Case(**{**case, "regs": regs, "found": sites}))
        return cls(**{**data, "cases": cases})


class Discarded(Exception):
    """The program does not run by itself."""


def loaded(text: str, name: str) -> dict[str, Any]:
    """The names of a source, in a module of its own, so that tracebacks have its lines and classes their home."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), module.__dict__)
    return module.__dict__


def forgotten(name: str) -> None:
    sys.modules.pop(name, None)
    linecache.cache.pop(f"<{name}>", None)


def backward(output: Any) -> Tensor:
    """A scalar that depends on every element of an output in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for i, leaf in enumerate(leaves(output)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            factors = torch.linspace(0.5 + 0.1 * i, 1.5, leaf.numel(), dtype=torch.float64).view(leaf.shape)
            total = total + (leaf.double() * factors).sum()
    return total


def leaves(output: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(output)


class Maker:
    """Makes the cases of a program."""

    def __init__(self, program: Program) -> None:
        self.program, self.source = program, Plain(program).text()
        try:
            self.flat = settle(Flattener(program))
        except WrittenInBranch as error:
            raise Discarded("a write in a branch on the mode") from error
        self.name = f"fuzzed_{program.seed}_{id(self)}"
        try:
            space = loaded(self.source, self.name)
            self.model: nn.Module = space["model"]()
            self.inputs: tuple[Any, ...] = space["inputs"]()
        finally:
            forgotten(self.name)
        paths = dict(self.model.named_modules(remove_duplicate=False))
        self.tables = {mode: table(program, self.flat, paths, mode) for mode in ("train", "eval")}
        self.two = any(each.eval_lines is not None for each in self.flat.flats)
        self.shapes = self._survey()
        self.known = self._known()

    def given(self) -> tuple[Any, ...]:
        grads = self.program.input_grads
        return tuple(x.clone().requires_grad_(grads and x.is_floating_point()) if isinstance(x, Tensor) else x for x in self.inputs)

    def _survey(self) -> dict[str, Any]:
        """The dims of all values, and whether they are written into later; and a proof that the flat source is the plain one's function."""
        text = self.oracle([], [], {}, see=True)
        forward = loaded_function(text)
        seen: dict[str, Any] = {}
        for mode in ("train", "eval"):
            run = Run([], [], [], 0)
            model, other = self._copy(), self._copy()
            model.train(mode == "train"), other.train(mode == "train")
            for path in self.program.apart:
                model.get_submodule(path).eval(), other.get_submodule(path).eval()
            torch.default_generator.manual_seed(5)
            try:
                plain = other(*self.given())
                total = backward(plain)
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
                elif mode == "train":
                    raise Discarded("no output needs a gradient")
            except RuntimeError as error:
                raise Discarded(str(error)) from error
            torch.default_generator.manual_seed(5)
            run.begin(mode == "train")
            ours, _ = forward(model, run, *self.given())
            same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves(plain), leaves(ours), strict=True)]
            if not all(same):
                bad = [torch.isnan(a).any() for a in leaves(plain) if isinstance(a, Tensor)]
                if any(bad):
                    raise Discarded("not a number")
                raise AssertionError(f"the flat source is another function than the plain one:\n{self.source}\n{text}")
            seen = {**run.shapes(), **seen}
        return seen

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def oracle(
        self, regs: Sequence[Reg], sites: Sequence[Sequence[str]], own: dict[str, float], see: bool = False, later: bool = False
    ) -> str:  # fmt: skip
        known = getattr(self, "known", None)
        cells = known.cells if known else {}
        axes = {site: axis for site, axis in (known.near | known.axes).items() if axis is not None} if known else {}
        more = None
        if later and known:
            reads = chains([r.kind for r in regs], [r.pattern for r in regs], named(regs), sites, known.parameters)
            more = Later(reads, known.convolved)
        return instrumented(self.program, self.flat, self.tables, regs, named(regs), sites, cells, axes, own, see, more)

    def _known(self) -> Known:
        values, sure = self.places()
        groups = dict[int, list[str]]()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        parameters = []
        for parameter in self.model.parameters():
            names = groups[id(parameter)]
            labels = [Name(name, type(modules[name.rpartition(".")[0]]).__name__) for name in names]
            parameters.append(Place(labels, "parameter", dims=parameter.dim()))
        dims = {site: count for site, (count, _) in self.shapes.items()}
        calls = dict[str, list[str]]()
        for place in values:
            for path in {n.module for n in place.names if n.module is not None and n.default}:
                calls.setdefault(path, []).append(place.name)
        cells = {path: sites for path, sites in calls.items() if isinstance(modules[path], nn.RNNCellBase)}
        axes = {}
        for place in values:
            layer = modules.get(place.names[0].module or "")
            if isinstance(layer, nn.RNNBase) and place.names[0].ports[0] == "out":
                axes[place.name] = 1 if layer.batch_first else 0
        for value in (v for mode in self.tables.values() for v in mode.values.values() if v.names):
            source, there = value, self.tables["train"].values
            while source.node is not None and source.node.node.is_a(DROPOUT) and source.node.reads[0] in there:
                source = there[source.node.reads[0]]  # the axis of a recurrent layer's output is also that of its dropout
            if source is not value and source.names and source.names[0].text in axes:
                axes[value.names[0].text] = axes[source.names[0].text]
        inputs = [p.name for p in values if p.role == "input"]
        agree = [p.name for p in self.tables["train"].places()] == [p.name for p in self.tables["eval"].places()]
        called = {path: len(sites) for path, sites in calls.items()}
        for place in values:
            place.written = self.shapes.get(place.name, (0, False))[1]
        known = Known(values, parameters, dims, axes, cells, called, sure, agree, inputs)
        train = self.tables["train"]
        known.convolved, known.tokens = axes_of.convolved(train), axes_of.token_readers(train)
        known.convolved |= dict.fromkeys((site for site in axes_of.moved(train) if not known.convolved.get(site)), None)
        known.recurrent = axes_of.behind(train, axes_of.RECURRENT)
        time_first = {path for path, module in modules.items() if isinstance(module, nn.RNNBase) and not module.batch_first}
        batch_first = {path for path, module in modules.items() if isinstance(module, nn.RNNBase) and module.batch_first}
        known.near = axes_of.near_time_first(train, time_first, dims)
        untold = axes_of.near_moved(train, batch_first) | axes_of.attended(train)
        known.near |= dict.fromkeys(site for site in untold if site not in known.near)
        return known

    def places(self) -> tuple[list[Place], bool]:
        train, other = self.tables["train"], self.tables["eval"]
        found = {p.name: p for p in train.places()}
        for place in other.places():
            found.setdefault(place.name, place)
        return list(found.values()), train.roles_sure and (not self.two)

    def case(self, regs: list[Reg], rng: random.Random, compiled: bool = False) -> Case:
        """What the regularizers should do. ``compiled``: no dropout is left to torch, whose masks a compiler draws otherwise."""
        wanted = [found(reg, self.known) for reg in regs]
        case = Case(regs, "", wanted, rng=rng.randint(0, 1 << 40), stripped=rng.random() < 0.25)
        if rng.random() < 0.25 and any(reg.kind not in (*SPLICES, *ON_READS) for reg in regs):
            case.penalties, case.scale = "attach", rng.choice((1.0, 1.0, 2.5))
        dropouts = self._dropouts()
        if dropouts and (compiled or rng.random() < 0.5):
            self._own(case, dropouts, rng, compiled)
        return case

    def _dropouts(self) -> list[tuple[Place, float]]:
        values = self.tables["train"].values.values()
        return [
            (Place(v.names, "value"), v.node.node.rate) for v in values if v.node is not None and v.node.node.rate is not None and v.names
        ]

    def _own(self, case: Case, dropouts: list[tuple[Place, float]], rng: random.Random, every: bool = False) -> None:
        places, was = [p for p, _ in dropouts], {p.name: rate for p, rate in dropouts}
        one = rng.choice(places).names[0].text
        partly = () if every else ({one: "off"}, {one: "seeded"})
        case.own_dropout = rng.choice(("seeded", "off", 0.3, {"*": "seeded", one: 0.1}, *partly))
        options = case.own_dropout if isinstance(case.own_dropout, dict) else {"*": case.own_dropout}
        for selector, value in options.items():
            for place in select((selector,), places, places)[0]:
                case.own[place.name] = was[place.name] if value == "seeded" else 0.0 if value == "off" else value
        case.own_sites = list(case.own)

    def group(self, cases: list[Case]) -> Group:
        nodes = [n.node for each in self.flat.flats for n in [*each.nodes, *(each.eval_nodes or [])]]
        sites = [p.name for p in self.known.values if p.usable]
        others = [p.name for p in self.known.values if not p.usable]
        return Group(
            self.program.number, self.source, sites, others, cases, self.program.input_grads, self.program.sized, "symbolic", self.two,
            any(n.is_a("write") for n in nodes), any(n.is_a("random") for n in nodes), bool(self.program.apart),
        )  # fmt: skip


def loaded_function(text: str) -> Any:
    """The forward of an oracle."""
    head = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\nfrom fuzz.shapes import Both, Pair\n"
    return loaded(head + text, "fuzzed_oracle")["forward"]


def make(seed: int, sets: int = 4, compiled: bool = False, later: int = 0) -> tuple[Maker, Group]:
    """The model of a seed, with several sets of regularizers, and ``later`` sets with what 0.2 brought. Raises Discarded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maker = Maker(generate(seed))
    rng = random.Random(seed * 7919 + 1)
    cases = []
    for _ in range(sets):
        regs = regularizers(maker.known, rng)
        if not regs:
            continue
        case = maker.case(regs, rng, compiled)
        case.oracle = maker.oracle(regs, [f.sites for f in case.found], case.own)
        cases.append(case)
    rng = random.Random(f"{seed} 0.2")  # of its own: the sets before are those that the seed always gave
    for _ in range(later):
        cases += _later(maker, rng, compiled)
    if not cases:
        raise Discarded("no regularizer fits")
    return maker, maker.group(cases)


def _later(maker: Maker, rng: random.Random, compiled: bool) -> list[Case]:
    """A case with the regularizers and options of 0.2, or nothing."""
    regs = variants.varied(variants.several(catalogue.regularizers(maker.known, rng), rng), maker, rng)
    keywords = variants.as_keywords(regs) if rng.random() < 0.4 else []
    regs = keywords or regs
    if not regs:
        return []
    case = maker.case(regs, rng, compiled)
    case.later, case.moves, case.keywords = True, any(reg.kind in STATEFUL for reg in regs), bool(keywords)
    variants.completed(case, maker, rng, compiled)
    case.oracle = maker.oracle(regs, [f.sites for f in case.found], case.own, later=True)
    return [case]


__all__ = ["KEYS", "PRODUCT", "Case", "Discarded", "Group", "Maker", "Table", "make"]
