"""``RankMesh``: the arguments of ``set_ranks(module, mesh=...)``. It finds out which axes ranks divide, for each splice of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from graphreg.errors import GraphRegError, RegularizerError, listed, shown
from graphreg.ir.metadata import Kind, addition_of, own_name
from graphreg.ir.module_record import RULES, state_of
from graphreg.ir.selector import select
from graphreg.ir.site import Site
from graphreg.planning.plan import Plan
from graphreg.runtime.dropout import NativeDropoutRule
from graphreg.runtime.noise_keys import key_rule_of
from graphreg.runtime.penalty import Measure, Total
from graphreg.runtime.rank_layout import Cut
from graphreg.runtime.rank_placements import DTENSOR, WHOLE, Sharing, Unequal, Unknown, has_parallel_layers, sharings
from graphreg.runtime.runtime_module import DrawingRule, Rules
from graphreg.runtime.sharding import parallelized_uncalled
from graphreg.runtime.splice import SpliceRule
from graphreg.torch_internals.distributed import world_size
from graphreg.torch_internals.modules import BatchNormBase

OTHER_NORMS = (nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # which have the class of batch norms
Placements = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RankMesh:
    """The dimensions of a device mesh, by what the ranks along them do.

    Attributes:
        mesh: The mesh, a ``torch.distributed.device_mesh.DeviceMesh`` whose dimensions have names.
        data: The dimensions along which ranks have different examples.
        tensor: The dimensions along which ranks work on the same examples together.
        placements: The placements of values where they cannot be inferred, by selector of sites, then by dimension.
        one_batch: Whether the examples of the ranks along ``data`` are one batch: each rank then draws its own rows of the masks that one
            process would draw for the whole batch.
    """

    mesh: Any
    data: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    placements: Placements = field(default_factory=dict)
    one_batch: bool = False

    def __post_init__(self) -> None:
        names = getattr(self.mesh, "mesh_dim_names", None)
        if not names:
            raise RegularizerError(
                f"mesh={shown(self.mesh)} is not allowed; give a DeviceMesh whose dimensions have names: "
                "torch.distributed.device_mesh.init_device_mesh('cuda', (2, 4), mesh_dim_names=('dp', 'tp'))."
            )
        for option, given in (("data", self.data), ("tensor", self.tensor)):
            if unknown := [name for name in given if name not in names]:
                raise RegularizerError(f"{option}={given!r}: the mesh has no dimension {unknown[0]!r}; it has {listed(list(names))}.")
        both = (*self.data, *self.tensor)
        if twice := [name for name in both if both.count(name) > 1]:
            raise RegularizerError(f"the dimension {twice[0]!r} is named twice; each belongs to data= or to tensor=, once.")
        if not isinstance(self.one_batch, bool):
            raise RegularizerError(f"one_batch={shown(self.one_batch)} is not allowed; give True or False.")
        if self.one_batch and not self.data:
            raise RegularizerError("one_batch=True is for ranks that have different examples: name their dimensions, data=('dp',).")
        if not isinstance(self.placements, Mapping):
            raise RegularizerError(
                f"placements={shown(self.placements)} is not allowed; give a dict from selectors of sites to dicts: "
                "{'up': {'tp': Shard(-1)}}."
            )
        for selector, by_name in self.placements.items():
            self._check_placements(selector, by_name)

    def _check_placements(self, selector: Any, by_name: Any) -> None:
        """Raise RegularizerError unless a dict has a placement for each dimension of ``tensor``."""
        if not isinstance(by_name, Mapping) or not by_name:
            raise RegularizerError(
                f"placements={{{selector!r}: {shown(by_name)}}} is not allowed; give a dict from a dimension of tensor= to a "
                f"placement: {{{selector!r}: {{'tp': Shard(-1)}}}}."
            )
        for name, placement in by_name.items():
            if name not in self.tensor:
                raise RegularizerError(f"placements: {name!r} is no dimension of tensor={self.tensor!r}.")
            if type(placement).__name__ not in ("Shard", "Replicate"):
                raise RegularizerError(
                    f"placements: {selector!r} has {shown(placement)} for {name!r}; a value is shared by Replicate() or Shard(axis), of "
                    "torch.distributed.tensor."
                )
        if missing := [name for name in self.tensor if name not in by_name]:
            raise RegularizerError(
                f"placements: {selector!r} says nothing about {missing[0]!r}. Give a placement for each dimension of "
                f"tensor={self.tensor!r}; Replicate() if its ranks have the whole value."
            )

    @property
    def position(self) -> int:
        """The number of this rank among the ranks that draw different masks; 0 if no two ranks do."""
        # The coordinates are the digits of one number, in the order of the mesh.
        position = 0
        for name in self._ordered(self.differing):
            position = position * self._size(name) + self._index(name)
        return position

    @property
    def differing(self) -> tuple[str, ...]:
        """The dimensions along which ranks draw different masks: none with ``one_batch``, where they draw parts of the same masks."""
        return () if self.one_batch else self.data

    def cuts(self, root: nn.Module) -> dict[DrawingRule, tuple[Cut, ...]]:
        """Return, for each runtime module that draws, the axes of its value that ranks divide. ``root``: the rewritten module.

        Raises:
            RegularizerError: A placement matches no site; or ranks divide a value, and the formula does not allow it.
            GraphRegError: How ranks share a value is not known; they divide it unequally; a penalty would measure a part of a value; or a
                module that the graphs do not call was made parallel.
        """
        if self.tensor and (uncalled := parallelized_uncalled(root)):
            raise GraphRegError(uncalled)
        found, chosen = dict[DrawingRule, tuple[Cut, ...]](), self._chosen(_sites(root))
        for rule, site, sharing in self._shared(root):
            axes = self._axes(rule, site, sharing, chosen.get(site))
            if isinstance(rule, DrawingRule):
                cuts = [self._cut(name, 0) for name in self._ordered(self.data) if self.one_batch]
                # Rows of the batch first: of two cuts of one axis, that into larger parts comes
                # first (``window``).
                found[rule] = (*cuts, *(self._cut(name, axis) for name, axis in axes.items()))
                _require(rule, found[rule])
            elif axes:
                raise GraphRegError(self._part_measured(rule, site, axes))
        rules: Any = root._modules[RULES]
        for rule in rules.children():  # each rank has a parameter whole, or as a DTensor that tells its place
            if isinstance(rule, SpliceRule) and rule.on_parameter:
                found[rule] = ()
        return found

    def _shared(self, root: nn.Module) -> Iterator[tuple[DrawingRule | Measure | Total, str, Sharing]]:
        """Yield each runtime module that reads values, the name of each value's site, and how ranks share the value."""
        state = state_of(root)
        for graph in state.graphs.values() if state is not None else ():
            known = self._known(root, graph)
            for node in graph.nodes:
                addition = addition_of(node)
                if addition is None or node.op != "call_module":
                    continue
                rule = root.get_submodule(str(node.target))
                if isinstance(rule, DrawingRule) and not (isinstance(rule, SpliceRule) and rule.on_parameter):
                    yield rule, rule.site, known(node.all_input_nodes[0])
                elif isinstance(rule, (Measure, Total)) and rule.regularizer.on == "values":
                    for read in filter(_is_value, node.all_input_nodes):
                        yield rule, addition.site or own_name(read), known(read)

    def _known(self, root: nn.Module, graph: fx.Graph) -> Callable[[fx.Node], Sharing]:
        """Return a function that returns how ranks share the value of a node."""
        if not self.tensor:
            return lambda node: WHOLE
        if len(self.tensor) > 1:
            return lambda node: Unknown("is shared along several dimensions")
        if not has_parallel_layers(root, self.tensor[0]):
            return lambda node: Unknown("comes from layers that are not parallel in a way that torch records")
        return sharings(root, graph, self.tensor[0]).__getitem__

    def _axes(
        self, rule: DrawingRule | Measure | Total, site: str, sharing: Sharing, given: Mapping[str, Any] | None
    ) -> dict[str, int]:
        """Return which axes of the value at a site ranks divide, by the dimension of the mesh.

        Raises:
            GraphRegError: That is not known, or they divide it unequally.
        """
        # placements= cannot help here: it says that all parts are equal.
        if isinstance(sharing, Unequal):
            raise GraphRegError(
                f"{rule.description}: the value {sharing.why}. Leave the site out; or give the layer a number of features that "
                f"{self._size(self.tensor[0])} divides."
            )
        if given is not None:
            return {name: int(given[name].dim) for name in self._ordered(tuple(given)) if given[name].is_shard()}
        if isinstance(sharing, Unknown):
            raise GraphRegError(self._ask(rule, site, sharing))
        return {} if sharing in (WHOLE, DTENSOR) else {self.tensor[0]: int(sharing)}

    def _part_measured(self, rule: Measure | Total, site: str, axes: Mapping[str, int]) -> str:
        name, axis = next(iter(axes.items()))
        at = "" if isinstance(rule, Measure) else f" at {site}"
        return (
            f"{rule.description}{at}: the ranks of {name!r} divide axis {axis} of the value, and each would measure its own "
            "part. Leave the site out; or let the layer return a DTensor (use_local_output=False), which is measured as a whole."
        )

    def _ask(self, rule: DrawingRule | Measure | Total, site: str, sharing: Unknown) -> str:
        each = ", ".join(f"{name!r}: Shard(-1)" for name in self.tensor)
        return (
            f"{rule.description}: how the ranks of {listed(list(self.tensor))} share the value is not known: it {sharing.why}. Say it: "
            f"set_ranks(module, mesh=mesh, data={self.data!r}, tensor={self.tensor!r}, placements={{{site!r}: "
            f"{{{each}}}}}), or Replicate() if each rank has the whole value."
        )

    def _chosen(self, sites: Sequence[Site]) -> dict[str, Mapping[str, Any]]:
        """Return the placements that were given, by the names of sites; the last selector that matches a site counts."""
        chosen: dict[str, Mapping[str, Any]] = {}
        for selector, by_name in self.placements.items():
            for site in select(selector, sites, sites, who="placements", what="value at which a regularizer acts", usual="all of them"):
                chosen[site.name] = by_name
        return chosen

    def _ordered(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in self.mesh.mesh_dim_names if name in names]

    def _size(self, name: str) -> int:
        return int(self.mesh.size(self.mesh.mesh_dim_names.index(name)))

    def _index(self, name: str) -> int:
        return int(self.mesh.get_local_rank(name))

    def _cut(self, name: str, axis: int) -> Cut:
        return Cut(axis, self._index(name), self._size(name), name)


def rank_notes(rules: Rules) -> list[str]:
    """Return the lines of the report that say which ranks draw the same masks; no lines if each rank draws its own."""
    key = key_rule_of(rules)
    if key is None or (key.position is None and not key.alike):
        return []
    if key.alike:
        return ["ranks: all draw the same masks"]
    sites: dict[str, list[str]] = {}
    for child in rules.children():
        if isinstance(child, DrawingRule) and child.cuts:
            dimensions = [f"{cut.name!r} (axis {cut.axis})" for cut in child.cuts]
            sites.setdefault(" and ".join(dimensions), []).append(child.site)
    lines = [f"ranks: at {', '.join(at)}, the ranks of {ranks} draw parts of one mask" for ranks, at in sites.items()]
    differing = ", ".join(map(repr, key.differing))
    rest = f"those of {differing} draw different masks; all others draw the same" if differing else "otherwise, all draw the same masks"
    return [*lines, f"ranks: {rest}"]


def batch_notes(module: nn.Module, rules: Rules, plan: Plan) -> list[str]:
    """Return the lines of the report that say what is computed from the batch of one rank; no lines if there is one rank.

    Args:
        module: The rewritten module.
        rules: The container of its runtime modules.
        plan: Its plan.
    """
    key = key_rule_of(rules)
    if (key is None or key.position is None) and world_size() == 1:
        return []
    penalties = [name for name, regularizer in plan.regularizers.items() if regularizer.over_batch and regularizer.on == "values"]
    norms = [path for path, inner in module.named_modules() if isinstance(inner, BatchNormBase) and not isinstance(inner, OTHER_NORMS)]
    lines = []
    if penalties:
        lines.append(f"ranks: {', '.join(penalties)}: a statistic of the batch, which each rank computes from its own examples")
    if norms:
        which = norms[0] if len(norms) == 1 else f"{len(norms)} batch norms, such as {norms[0]}"
        lines.append(f"ranks: {which}: normalizes by the statistics of the rank's own examples; nn.SyncBatchNorm by those of all ranks")
    return lines


def _is_value(node: fx.Node) -> bool:
    """Return whether a node that a penalty reads has a value of the model, not a number that graphreg computed."""
    addition = addition_of(node)
    return addition is None or addition.kind not in (Kind.KEY, Kind.CLOCK, Kind.MEASURE, Kind.TOTAL)


def _sites(root: nn.Module) -> list[Site]:
    """Return the sites of a rewritten module at which something draws, or whose values a penalty measures."""
    rules: Any = root._modules[RULES]
    plan = rules.build_record.plan
    sites = [edit.site for edit in plan.edits if edit.regularizer.on == "values"]
    return list(dict.fromkeys([*sites, *(native.dropout.site for native in plan.native_dropout)]))


def _require(rule: DrawingRule, cuts: Sequence[Cut]) -> None:
    """Raise RegularizerError if a runtime module cannot draw for a part of its value. ``cuts``: how ranks divide the value."""
    if not cuts:
        return
    if isinstance(rule, SpliceRule):
        allowed = rule.regularizer.separable
        if allowed == "elements" or (allowed == "examples" and all(cut.axis == 0 for cut in cuts)):
            return
        name = type(rule.regularizer).__name__
        cure = f"If the formula of {name} treats each element by itself, its class can say so: separable = 'elements'."
    elif isinstance(rule, NativeDropoutRule) and rule.kind not in ("heads", "attention"):
        return
    else:
        name, cure = "dropout inside an attention function", "With own_dropout='keep', torch draws it."
    where = listed([f"{cut.name!r} (axis {cut.axis})" for cut in cuts])
    raise RegularizerError(
        f"{rule.description}: the ranks of {where} share the value, and {name} may look at the whole of it. Leave the site out, or "
        f"choose one at which each rank has the whole value. {cure}"
    )
