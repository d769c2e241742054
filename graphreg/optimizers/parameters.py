"""``ModelParameters``: the parameters of any model as sites, which selectors find without a trace; ``named_parameters``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from graphreg.errors import RegularizerError, shown
from graphreg.ir.module_record import traced_model
from graphreg.ir.selector import Pattern, Selector, select, strings
from graphreg.ir.site import Label, Site
from graphreg.runtime.owned_state import states_in
from graphreg.torch_internals.distributed import has_process_group, sharded_parameters
from graphreg.torch_internals.modules import modules_in_wrappers
from graphreg.tracing.trace import parameter_site


@dataclass(frozen=True)
class ModelParameters:
    """The parameters of a model, also of one that is regularized, compiled, wrapped or sharded.

    Attributes:
        title: The name of the model's class.
        modules: The modules by path. Wrappers of torch's (of ``torch.compile``, of parallel training, of checkpoints) are no part of a
            path, so that names are the same with and without them.
        of_site: The parameter of each site, in the order in which the model registers them. A tied parameter has one site, with all of
            its names.
        owned: The sites of parameters that regularizers learn.
    """

    title: str
    modules: dict[str, nn.Module]
    of_site: dict[Site, nn.Parameter]
    owned: frozenset[Site]

    @classmethod
    def of(cls, model: nn.Module) -> ModelParameters:
        """Find the parameters of a model. Raises RegularizerError if it is no module."""
        if not isinstance(model, nn.Module):
            raise RegularizerError(f"the model is {shown(model)}; give a torch.nn.Module.")
        named, modules = dict[int, tuple[nn.Parameter, list[str]]](), dict[str, nn.Module]()
        # FSDP2 lends gathered tensors to a module while it runs; an optimizer has FSDP2's own parameters.
        lent = sharded_parameters() if has_process_group() else {}
        for path, module, _ in modules_in_wrappers(model):
            # A module that graphreg rewrote stands for the model that it was made from, whose class has the name and the methods.
            modules[path] = traced_model(module) or module
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    own = lent.get(id(parameter), parameter)
                    named.setdefault(id(own), (own, []))[1].append(f"{path}.{name}" if path else name)  # type: ignore[arg-type]

        of_regularizers = {id(parameter) for state in states_in(model) for parameter in state.parameters()}
        # What no regularizer could act on is a parameter here, too: one without elements, or of a lazy module.
        sites = {replace(parameter_site(modules, names, p), selectable=True, why_not=""): p for p, names in named.values()}
        owned = frozenset(site for site, parameter in sites.items() if id(parameter) in of_regularizers)
        return cls(type(modules[""]).__name__.removesuffix("Impl"), modules, sites, owned)

    def matching(self, selector: Selector, who: str) -> dict[Site, str]:
        """Return the sites that a selector selects, in the model's order, each with the string that matched it first.

        Raises NoMatchError if the selector, or one of its strings, matches nothing. ``who``: the function that asks, for messages.
        """
        sites = tuple(self.of_site)
        return select(selector, sites, sites, what="parameter", model=self.title, who=who, usual="all parameters", hint=self._of_a_module)

    def labels(self, selector: Selector, site: Site) -> set[Label]:
        """Return those names of a selected site that the selector matches: all, if it is a function or has only strings with ``!``."""
        patterns = [Pattern.parse(text) for text in strings(selector)]
        chosen = [pattern for pattern in patterns if not pattern.exclude]
        if not chosen or any(pattern.lone for pattern in chosen):
            return set(site.labels)
        return {label for pattern in chosen for label, _ in pattern.labels([site])}

    def _of_a_module(self, text: str) -> str:
        """Return a hint for a string that names a module, and no parameter."""
        name = Pattern.parse(text).literal
        return f" {name!r} is a module; {name + '.*'!r} selects its parameters." if name in self.modules else ""


def named_parameters(model: nn.Module, selector: Selector) -> dict[str, nn.Parameter]:
    """Return the parameters that a selector selects, by name, in the model's order.

    They are the model's own, whether they require gradients or not: to freeze, count, initialize
    or clip them. The model is not traced.

    Args:
        model: Any model, also one that is regularized, compiled, wrapped or sharded.
        selector: A string, several strings, or a function of a site, as for regularizers;
            ``"*"`` selects all parameters.

    Returns:
        The parameters by name. A tied parameter is there once, by its first name.

    Raises:
        NoMatchError: The selector, or one of its strings, matches nothing.
        RegularizerError: ``model`` is no module, or the selector is not valid.
    """
    parameters = ModelParameters.of(model)
    return {site.name: parameters.of_site[site] for site in parameters.matching(selector, "named_parameters")}
