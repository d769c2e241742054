"""The oracle: the program's source in one forward, with splices and measurements written after the statements that they belong to.

``instrumented`` writes that source; ``Run`` is what it calls: masks from draws.py, formulas in plain torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz import draws
from fuzz.choices import ON_READS, ON_WEIGHTS, SPLICES, STEPS, Reg
from fuzz.formulas import Unfit
from fuzz.later_oracle import LaterRun, laid, weight
from fuzz.names import Table
from fuzz.program import PARAMETER, WRITE, FlatNode, Flattener, Program, access, returned
from fuzz.reading import Chain
from fuzz.strengths import Strengths


def instrumented(
    program: Program, flat: Flattener, tables: Mapping[str, Table], regs: Sequence[Reg], names: Sequence[str],
    sites: Sequence[Sequence[str]], cells: Mapping[str, Sequence[str]], axes: Mapping[str, int], own: Mapping[str, float],
    see: bool = False, later: Later | None = None,
) -> str:  # fmt: skip
    """The source of ``forward(self, ..., R)``. ``own``: what becomes of the model's dropouts, by site: a rate, 0 is off."""
    writer = _Writer(tables, regs, names, sites, cells, axes, own, see)
    writer.later = later
    plain = [name for name, _ in program.inputs[: len(program.inputs) - program.variadic]]
    lines = [f"def forward({', '.join(['self', 'R', *plain, *(['*rest'] if program.variadic else [])])}):"]
    if program.variadic:
        lines += [f"    rest_{i} = rest[{i}]" for i in range(program.variadic)]
    for var in flat.inputs:
        lines += [f"    {line}" for line in writer.after(var.key, var.name, "", "train")]
    for each in flat.flats:
        lines += [f"    {line}" for line in writer.statement(each)]
    values = returned(program.root, [var.name for var in flat.returned])
    return "\n".join([*lines, f"    return {values}, R.penalties(self)"]) + "\n"


@dataclass
class Later:
    """What regularizers of 0.2 need besides: ``reads``, the splices at reads of parameters; ``convolved`` as in axes.py."""

    reads: Mapping[str, Mapping[str, Chain]]
    convolved: Mapping[str, bool | None]


class _Writer:
    later: Later | None = None

    def __init__(self, tables: Any, regs: Any, names: Any, sites: Any, cells: Any, axes: Any, own: Any, see: bool) -> None:
        self.tables, self.cells, self.axes, self.own, self.see = tables, cells, axes, own, see
        self.edits: dict[str, list[tuple[str, Reg, int]]] = {}
        seen: dict[tuple[str, str], int] = {}
        for name, reg, found in zip(names, regs, sites, strict=True):
            for site in found:
                at = seen.setdefault((site, reg.kind), 0)
                seen[site, reg.kind] += 1
                self.edits.setdefault(site, []).append((name, reg, at))
        self.tracked = {
            site: [name for name, reg in zip(names, regs, strict=True) if reg.kind == "Contractive" and self._wrt(reg, site)]
            for site in [v.names[0].text for v in tables["train"].values.values() if v.names]
        }

    def _wrt(self, reg: Reg, site: str) -> bool:
        value = next(v for v in self.tables["train"].values.values() if v.names and v.names[0].text == site)
        chosen = reg.options.get("wrt", "*")
        return bool(value.role == "input" and value.selectable if chosen == "*" else chosen == site)

    def statement(self, flat: Any) -> list[str]:
        if flat.eval_lines is None:
            return self._lines(flat.lines, flat.nodes, None)
        train, other = self._lines(flat.lines, flat.nodes, "train"), self._lines(flat.eval_lines, flat.eval_nodes, "eval")
        indent = "    "
        return [f"if {access(flat.owner)}.training:", *(indent + x for x in train), "else:", *(indent + x for x in other)]

    def _lines(self, lines: Sequence[str], nodes: Sequence[FlatNode], mode: str | None) -> list[str]:
        found = []
        for i, line in enumerate(lines):
            text = line
            for node in nodes:
                if node.node.line == i and node.node.rate is not None:
                    text = self._own(node, line)
                if node.node.line == i and self.later is not None:
                    text = self._reads(node, text)
            found.append(text)
            for node in nodes:
                if node.node.line == i and node.var.name:
                    self.given = line.rpartition("(")[2].rstrip(")") if node.module else "None"
                    found += self._after(node, mode)
        return found

    def _own(self, node: FlatNode, line: str) -> str:
        site = self.tables["train"].values[node.var.key].names[0].text
        if site not in self.own:
            return line
        given = self.tables["train"].values.get(node.reads[0])
        owner = access(node.module or node.scope)
        source = line.partition("(")[2].partition(",")[0].rstrip(")") if not node.module else line.rpartition("(")[2].rstrip(")")
        assert given is not None
        writes = node.node.is_a(WRITE)
        return f"{node.var.name} = R.own({source}, {site!r}, {self.own[site]!r}, {node.node.rate!r}, {owner}.training, {writes})"

    def _reads(self, node: FlatNode, line: str) -> str:
        """The line, where what splices give is read in place of parameters."""
        assert self.later is not None
        if node.module:
            chains = self.later.reads.get(node.module, {})
            scope, _, own = node.module.rpartition(".")
            for call in (f"{access(node.module)}(", f"{access(scope)}[{own}]("):
                if chains and call in line:
                    return line.replace(call, f"R.layer(self, {node.module!r}, {dict(chains)!r})(")
            return line
        chain = self.later.reads.get(node.scope, {}).get(node.node.base)
        if not node.node.is_a(PARAMETER) or not chain:
            return line
        expression = f"{access(node.scope)}.{node.node.base}"
        return re.sub(rf"(?<!read\(self, ){re.escape(expression)}\b", f"R.read(self, {expression}, {chain!r})", line)

    given = "None"  # what a layer is called with, if it has one argument

    def _after(self, node: FlatNode, mode: str | None) -> list[str]:
        """What stands behind the statement, for the names that the value has in the modes in which it is made."""
        if node.var.key not in self.tables[mode or "train"].values:
            return []
        if mode is not None:
            return self.after(node.var.key, node.var.name, self._owner(node), mode)
        train = self.after(node.var.key, node.var.name, self._owner(node), "train")
        other = self.after(node.var.key, node.var.name, self._owner(node), "eval")
        if train == other:
            return train
        return [
            "if self.training:", *(f"    {x}" for x in train or ["pass"]), "else:", *(f"    {x}" for x in other or ["pass"])
        ]  # fmt: skip

    def _owner(self, node: FlatNode) -> str:
        return node.module or node.scope

    def after(self, key: int, var: str, owner: str, mode: str) -> list[str]:
        """Tracking, clean measurements, splices in order, measurements."""
        value = self.tables[mode].values.get(key)
        if value is None or not value.names:
            return []
        site = value.names[0].text
        edits = self.edits.get(site, []) if value.selectable else []
        lines = [f"R.see({site!r}, {var})"] if self.see else []
        if self.tracked.get(site):
            lines.append(f"{var} = R.track({site!r}, {var}, {self.tracked[site]!r})")
        lines += [self._measure(site, var, *edit) for edit in edits if edit[1].kind not in SPLICES and edit[1].options.get("clean")]
        for name, reg, at in edits:
            if reg.kind in SPLICES and self.later is not None:
                more = f"{self.axes.get(site, 1)}, {self.given if reg.kind == 'LayerDrop' else None}"
                lines.append(f"{var} = R.splice({var}, {name!r}, {site!r}, {at}, {access(owner)}.training, {more})")
            elif reg.kind in SPLICES:
                kind, rng = "dropout" if reg.kind == "BernoulliDropout" else "noise", reg.options.get("rng")
                lines.append(f"{var} = R.{kind}({var}, {site!r}, {at}, {reg.weight!r}, {rng!r}, {access(owner)}.training)")
        lines += [self._measure(site, var, *edit) for edit in edits if edit[1].kind not in SPLICES and not edit[1].options.get("clean")]
        return lines

    def _measure(self, site: str, var: str, name: str, reg: Reg, at: int) -> str:
        if self.later is not None and reg.kind not in (*STEPS, "Contractive"):
            axis = reg.options.get("axis")
            axis = axis if axis is not None else -2 if self.later.convolved.get(site) else -1
            return f"R.measure({name!r}, {site!r}, {var}.clone(), {axis})"
        if reg.kind == "HiddenL1":
            return f"R.measure({name!r}, {site!r}, {var}.clone(), -1)"
        if reg.kind == "Contractive":
            return f"R.differentiate({name!r}, {site!r}, {at}, {var}.clone())"
        cell = next((path for path, calls in self.cells.items() if site in calls and path in reg.pattern), None)
        if cell is not None:
            return f"R.step({name!r}, '{cell} {self.tables['train'].chains(cell).get(site, 0)}', {var}.clone())"
        axis = reg.options.get("time_axis", 1)
        axis = self.axes.get(site, 1) if axis == 1 else axis  # 1 is the default
        return f"R.put({name!r}, R.{reg.kind}(R.steps({var}.clone(), {axis}), {reg.options.get('norm')!r}))"


class Run(LaterRun):
    """One call of the oracle: its draws and its measurements."""

    def __init__(
        self, regs: Sequence[Reg], names: Sequence[str], sites: Sequence[Sequence[str]], seed: int, strengths: Strengths | None = None
    ) -> None:  # fmt: skip
        self.strengths = strengths or Strengths({name: reg.weight for name, reg in zip(names, regs, strict=True)}, {}, ())
        self.states: dict[tuple[str, str], Tensor] = {}  # of penalties on parameters
        self.regs, self.names, self.seed, self.call = dict(zip(names, regs, strict=True)), names, seed, 0
        self.sites = dict(zip(names, sites, strict=True))
        self.bypass = False
        self.seen: dict[str, Any] = {}
        self.drawing = True
        self.begin(True)

    def begin(self, training: bool) -> None:
        """Before a call: nothing is measured yet."""
        self.training = training
        self.must_raise = ""  # why the module should raise in this call
        self.terms: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self.cells: dict[tuple[str, str], list[Tensor]] = {}
        self.values: dict[str, dict[str, tuple[int, Tensor]]] = {}
        self.wrt: dict[str, dict[str, Tensor]] = {}
        self.contractions: dict[str, Tensor] = {}

    def see(self, site: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.seen.setdefault(site, (value, value._version))

    def shapes(self) -> dict[str, tuple[int, bool]]:
        """Of each site that was seen, its number of dims, and whether something has written into its storage since."""
        return {site: (value.dim(), value._version != version) for site, (value, version) in self.seen.items()}

    def _key(self, site: str, kind: str, at: int, rng: int | None = None) -> tuple[int, int]:
        return draws.key(draws.stream(self.seed if rng is None else rng, site, kind, at), self.call)

    def dropout(self, z: Tensor, site: str, at: int, p: float, rng: int | None, training: bool) -> Tensor:
        if not training:
            return z
        if self.bypass:
            return laid(z.clone(), z)
        keep = draws.keep(self._key(site, "BernoulliDropout", at, rng), z, p)
        return laid(z * (keep * (1 / (1 - weight(p, z)))), z)

    def noise(self, z: Tensor, site: str, at: int, sigma: float, rng: int | None, training: bool) -> Tensor:
        if not training:
            return z
        if self.bypass:
            return laid(z.clone(), z)
        drawn = draws.normal(self._key(site, "GaussianNoise", at, rng), z)
        return laid(z + weight(sigma, z) * drawn, z)

    def own(self, z: Tensor, site: str, rate: float, was: float, training: bool, writes: bool) -> Tensor:
        if self.bypass:
            return F.dropout(z, was, training, writes)
        if rate == 0 or not training:
            return z
        dropped = z * (draws.keep(self._key(site, "own dropout", 0), z, rate) * (1 / (1 - rate)))
        return z.copy_(dropped) if writes else dropped

    def put(self, name: str, value: Tensor) -> None:
        self.terms[name].append(value)

    def step(self, name: str, cell: str, value: Tensor) -> None:
        self.cells.setdefault((name, cell), []).append(value)

    def track(self, site: str, x: Tensor, names: Sequence[str]) -> Tensor:
        acting = [name for name in names if self.acts(self.regs[name])]
        if self.bypass:
            return laid(x.clone(), x)
        for name in names:
            self.wrt.setdefault(name, {})[site] = x
        if not acting:
            return x
        tracked = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        for name in names:
            self.wrt[name][site] = tracked
            self._contract(name)
        return laid(tracked.clone(), x)  # a copy, for the model may write into it

    def differentiate(self, name: str, site: str, at: int, value: Tensor) -> None:
        self.values.setdefault(name, {})[site] = (at, value)
        self._contract(name)

    def acts(self, reg: Reg) -> bool:
        return self.training or bool(reg.options.get("always"))

    @staticmethod
    def steps(value: Tensor, axis: int) -> Tensor:
        """[time, batch, units]."""
        value = Run.wide(value)
        if value.dim() < 2 or (value.dim() > 2 and axis >= value.dim()):
            raise Unfit(f"no axis {axis} of time in a value of {value.dim()} dims")
        return value.unsqueeze(1) if value.dim() == 2 else value.movedim(axis, 0).flatten(2)

    @staticmethod
    def RecurrentNorm(steps: Tensor, norm: str | None) -> Tensor:
        sizes = torch.linalg.vector_norm(steps, dim=-1) if norm == "l2" else (steps * steps).sum(-1)
        return _mean((sizes[1:] - sizes[:-1]) ** 2)

    @staticmethod
    def RecurrentState(steps: Tensor, norm: str | None) -> Tensor:
        return _mean((steps[1:] - steps[:-1]) ** 2)

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """All of them, in order: the mean over sites, times the strength."""
        for (name, _), values in self.cells.items():
            reg = self.regs[name]
            formula = Run.RecurrentNorm if reg.kind == "RecurrentNorm" else Run.RecurrentState
            self.put(name, formula(self.steps(torch.stack(values), 0), reg.options.get("norm")))
        found = {}
        for name, reg in self.regs.items():
            if reg.kind in SPLICES or reg.kind in ON_READS:
                continue
            if reg.kind == "Contractive":
                total = self.contractions[name] if name in self.contractions else self._contraction(name, reg)
            elif reg.kind in ON_WEIGHTS:
                terms = [self._of_parameter(model.get_parameter(site), reg, name, site) for site in self.sites[name]]
                total = torch.stack(terms).sum() if reg.options.get("reduction") == "sum" else torch.stack(terms).mean()
            else:
                total = torch.stack(self.terms[name]).mean() if self.terms[name] else torch.zeros(())
            by_site = reg.kind not in ("Contractive", *STEPS)  # each term has the strength of its site in it
            found[name] = total if by_site else total * self.strengths.of(name, "")
        return found

    def _contract(self, name: str) -> None:
        """Differentiate as soon as all values are there: the model may later write into what backward needs."""
        if len(self.values.get(name, {})) == len(self.sites[name]):
            self.contractions[name] = self._contraction(name, self.regs[name])

    def _contraction(self, name: str, reg: Reg) -> Tensor:
        values, inputs = self.values.get(name, {}), self.wrt.get(name, {})
        if not values or not self.acts(reg) or self.bypass:
            return torch.zeros(())
        real = [x for x in inputs.values() if x.is_floating_point()]
        rows = []
        if reg.options["estimator"] == "mean":
            for _, z in values.values():
                rows += [g.pow(2).mean() for g in _back([z.mean()], real, [None])]
            return torch.stack([self.wide(row) for row in rows]).mean()
        if reg.options["estimator"] == "exact":
            for _, z in values.values():
                for each in z.reshape(-1):
                    rows += [_size(g) for g in _back([each], real, [None])]
            return torch.stack([self.wide(row) for row in rows]).sum() / len(values)
        n: int = reg.options.get("n", 1)
        signs: dict[str, Tensor] = {}
        for site, (at, z) in values.items():
            drawn = draws.keep(self._key(site, "Contractive", at), z.detach().new_empty((n, *z.shape)), 0.5)
            signs[site] = 2 * drawn - 1
        for i in range(n):
            rows += [_size(g) for g in _back([z for _, z in values.values()], real, [signs[site][i] for site in values])]
        total: Tensor = torch.stack([self.wide(row) for row in rows]).sum()
        return total / (n * len(values))


def _back(outputs: list[Tensor], inputs: list[Tensor], vectors: list[Any]) -> list[Tensor]:
    live = [(z, v) for z, v in zip(outputs, vectors, strict=True) if z.requires_grad]
    if not live or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad([z for z, _ in live], inputs, [v for _, v in live], create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _size(g: Tensor) -> Tensor:
    squares: Tensor = g * g
    return squares.sum() / (len(g) if g.dim() else 1)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()


__all__ = ["STEPS", "Run", "instrumented"]
