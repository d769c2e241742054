"""The oracle: the program's source in one forward, with splices and measurements written after the statements that they belong to.

``instrumented`` writes that source; ``Run`` is what it calls: masks from draws.py, formulas in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz import draws
from fuzz.choices import ON_WEIGHTS, SPLICES, STEPS, Reg
from fuzz.names import Table
from fuzz.program import WRITE, FlatNode, Flattener, Program, access, returned


def instrumented(
    program: Program, flat: Flattener, tables: Mapping[str, Table], regs: Sequence[Reg], names: Sequence[str],
    sites: Sequence[Sequence[str]], cells: Mapping[str, Sequence[str]], axes: Mapping[str, int], own: Mapping[str, float],
    see: bool = False,
) -> str:  # fmt: skip
    """The source of ``forward(self, ..., R)``. ``own``: what becomes of the model's dropouts, by site: a rate, 0 is off."""
    writer = _Writer(tables, regs, names, sites, cells, axes, own, see)
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


class _Writer:
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
            found.append(text)
            for node in nodes:
                if node.node.line == i and node.var.name:
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
        for _, reg, at in edits:
            if reg.kind in SPLICES:
                kind, rng = "dropout" if reg.kind == "BernoulliDropout" else "noise", reg.options.get("rng")
                lines.append(f"{var} = R.{kind}({var}, {site!r}, {at}, {reg.weight!r}, {rng!r}, {access(owner)}.training)")
        lines += [self._measure(site, var, *edit) for edit in edits if edit[1].kind not in SPLICES and not edit[1].options.get("clean")]
        return lines

    def _measure(self, site: str, var: str, name: str, reg: Reg, at: int) -> str:
        if reg.kind == "HiddenL1":
            return f"R.put({name!r}, R.wide({var}.clone()).abs().mean())"
        if reg.kind == "Contractive":
            return f"R.differentiate({name!r}, {site!r}, {at}, {var}.clone())"
        cell = next((path for path, calls in self.cells.items() if site in calls and path in reg.pattern), None)
        if cell is not None:
            return f"R.step({name!r}, '{cell} {self.tables['train'].chains(cell).get(site, 0)}', {var}.clone())"
        axis = self.axes.get(site, reg.options.get("time_axis", 1))
        return f"R.put({name!r}, R.{reg.kind}(R.steps({var}.clone(), {axis}), {reg.options.get('norm')!r}))"


class Run:
    """One call of the oracle: its draws and its measurements."""

    def __init__(self, regs: Sequence[Reg], names: Sequence[str], sites: Sequence[Sequence[str]], seed: int) -> None:
        self.regs, self.names, self.seed, self.call = dict(zip(names, regs, strict=True)), names, seed, 0
        self.sites = dict(zip(names, sites, strict=True))
        self.bypass = False
        self.seen: dict[str, Any] = {}
        self.drawing = True
        self.begin(True)

    def begin(self, training: bool) -> None:
        """Before a call: nothing is measured yet."""
        self.training = training
        self.terms: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self.cells: dict[tuple[str, str], list[Tensor]] = {}
        self.values: dict[str, dict[str, tuple[int, Tensor]]] = {}
        self.wrt: dict[str, dict[str, Tensor]] = {}

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
        return laid(tracked.clone(), x)  # a copy, for the model may write into it

    def differentiate(self, name: str, site: str, at: int, value: Tensor) -> None:
        self.values.setdefault(name, {})[site] = (at, value)

    def acts(self, reg: Reg) -> bool:
        return self.training or bool(reg.options.get("always"))

    @staticmethod
    def wide(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else value.float()

    @staticmethod
    def steps(value: Tensor, axis: int) -> Tensor:
        """[time, batch, units]."""
        value = Run.wide(value)
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
            if reg.kind in SPLICES:
                continue
            if reg.kind == "Contractive":
                total = self._contraction(name, reg)
            elif reg.kind in ON_WEIGHTS:
                terms = [self._of_parameter(model.get_parameter(site), reg) for site in self.sites[name]]
                total = torch.stack(terms).sum() if reg.options.get("reduction") == "sum" else torch.stack(terms).mean()
            else:
                total = torch.stack(self.terms[name]).mean() if self.terms[name] else torch.zeros(())
            found[name] = total * reg.weight
        return found

    def _of_parameter(self, w: Tensor, reg: Reg) -> Tensor:
        w = self.wide(w)
        each = w * w if reg.kind == "WeightL2" else w.abs()
        return each.sum() if reg.options.get("reduction") == "sum" else each.mean()

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


def weight(value: float, z: Tensor) -> Tensor:
    """A strength in the precision it is used in."""
    return torch.tensor(value, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def laid(new: Tensor, old: Tensor) -> Tensor:
    """The same values in the strides that the value has in the model, where each element has a place of its own."""
    if new.stride() == old.stride() or not _alone(old):
        return new
    size = 1 + sum((length - 1) * stride for length, stride in zip(old.shape, old.stride(), strict=True))
    placed = torch.zeros(size, dtype=new.dtype).as_strided(old.shape, old.stride())
    placed.copy_(new)
    return placed


def _alone(z: Tensor) -> bool:
    """Whether no two elements share a place in memory; torch itself does not say so of a part of a tensor."""
    places = torch.zeros(z.shape, dtype=torch.int64)
    for axis, stride in enumerate(z.stride()):
        places += (torch.arange(z.shape[axis]) * stride).view(-1, *[1] * (z.dim() - axis - 1))
    return places.unique().numel() == z.numel()


__all__ = ["STEPS", "Run", "instrumented"]
