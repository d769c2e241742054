"""Where a graph reads the model's parameters: in the calls of layers and opaque modules, and by ``get_attr`` nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from graphreg.ir.metadata import scope_of
from graphreg.ir.site import Site


@dataclass(frozen=True)
class ParameterRead:
    """One read of a parameter.

    If a graph returns a parameter, that is no read: the graph always returns the parameter itself,
    never a replacement.

    Attributes:
        node: The node that reads: the call of a module that contains the parameter, or a node that
            has the parameter as an argument.
        source: The ``get_attr`` node that fetches this argument; None for the call of a module.
        name: For the call of a module, the parameter's name within the called module; else ``""``.
        module: For the call of a module, the path of the module that owns the parameter: the called
            module or a submodule of it. Else, the path of the module whose forward made ``node``.
    """

    node: fx.Node
    source: fx.Node | None
    name: str
    module: str

    def is_by(self, readers: frozenset[str] | None) -> bool:
        """Return whether one of the modules with the paths ``readers`` makes the read; None stands for all modules.

        A read through a ``get_attr`` node is made by the module whose forward made the reading
        node, and by every module around that one.
        """
        if readers is None or self.module in readers:
            return True
        return self.source is not None and any(path == "" or self.module.startswith(f"{path}.") for path in readers)


ParameterReads = Mapping[str, tuple[ParameterRead, ...]]


def parameter_reads(graph: fx.Graph, parameters: tuple[Site, ...]) -> ParameterReads:
    """Return the reads of each parameter in a traced graph, in the order of the graph. The keys are the names of the parameters' sites."""
    owner: dict[str, str] = {}  # any name of a parameter -> the name of its site
    inside: dict[str, list[str]] = {}  # the path of a module -> the names of the parameters in it
    for site in parameters:
        for label in site.labels:
            owner[label.name] = site.name
            names = label.name.split(".")
            for depth in range(1, len(names)):
                inside.setdefault(".".join(names[:depth]), []).append(label.name)

    reads: dict[str, list[ParameterRead]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            for name in inside.get(path, ()):
                read = ParameterRead(node, None, name.removeprefix(f"{path}."), name.rpartition(".")[0])
                reads.setdefault(owner[name], []).append(read)
        elif node.op != "output":
            for source in node.all_input_nodes:
                if source.op == "get_attr" and (site_name := owner.get(str(source.target))) is not None:
                    reads.setdefault(site_name, []).append(ParameterRead(node, source, "", scope_of(node)))
    return {name: tuple(each) for name, each in reads.items()}


def alias_paths(modules: Mapping[str, nn.Module], paths: frozenset[str]) -> frozenset[str]:
    """Return the paths, and all other paths of the same modules. A module that is registered twice has two paths."""
    wanted = {id(modules[path]) for path in paths}
    return frozenset(path for path, module in modules.items() if id(module) in wanted)
