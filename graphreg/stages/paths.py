"""Translates the paths of a stage's modules and tensors into those of the whole model, and makes a root module with the new paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from graphreg.errors import RegularizerError
from graphreg.torch_internals.modules import TENSOR_REGISTRIES, buffers_by_name, parameters_by_name

_UNSAVED = TENSOR_REGISTRIES[-1]  # the attribute of a module that has the names of its non-persistent buffers


@dataclass(frozen=True)
class Paths:
    """Where the modules and tensors of a stage are in the whole model.

    Attributes:
        stage: The stage.
        renamed: From paths in the stage to paths in the whole model, where the two differ. An entry for a module also holds for what is
            inside it, except for what has an entry of its own.
    """

    stage: nn.Module
    renamed: Mapping[str, str]

    @classmethod
    def of(cls, stage: nn.Module, whole: nn.Module, given: Mapping[str, str]) -> Paths:
        """Make a ``Paths`` from the paths that the user gave, and from the modules that the stage and the whole model share.

        Raises:
            RegularizerError: Two tensors of the stage get the same path.
        """
        modules = dict(whole.named_modules(remove_duplicate=False))
        # Of a module with several paths, the first counts.
        theirs = {id(module): path for path, module in reversed(modules.items())}
        paths = cls(stage, {path: name for path, name in given.items() if path != name})
        for path, module in stage.named_modules(remove_duplicate=False):  # a module comes before what is inside it
            shared = theirs.get(id(module))
            if shared is not None and path not in given and modules.get(paths(path)) is not module:
                paths = cls(stage, {**paths.renamed, path: shared})
        paths._check()
        return paths

    def __call__(self, path: str) -> str:
        """Translate a path in the stage into the path in the whole model."""
        outer = path
        # The innermost entry counts: {'0': 'layers.4', '0.ff': 'layers.4.mlp'} gives 0.ff.w the
        # second.
        while outer not in self.renamed:
            if not outer:
                return path
            outer = outer.rpartition(".")[0]
        inside = path[len(outer) :].removeprefix(".")
        return ".".join(filter(None, (self.renamed[outer], inside)))

    def _check(self) -> None:
        seen: dict[str, str] = {}
        for path in tensor_names(self.stage):
            if (other := seen.setdefault(self(path), path)) != path:
                raise RegularizerError(
                    f"names= gives {path!r} and {other!r} of the stage the same name in the whole model, {self(path)!r}. Give each its own."
                )

    def root(self) -> nn.Module:
        """Return a module with the modules and tensors of the stage under their paths in the whole model: the stage, if no path differs."""
        if not self.renamed:
            return self.stage
        root = _container(self.stage, type(self.stage).__name__)
        self._place("", self.stage, root)
        return root

    def _place(self, path: str, module: nn.Module, root: nn.Module) -> None:
        """Put a module into the root: as it is, or in parts if paths inside it are renamed."""
        # A module inside which paths are renamed is taken apart, since the stage itself must stay
        # as it is.
        within = [each for each in self.renamed if each != path and (each.startswith(f"{path}.") or not path)]
        if path and not within:
            _put(root, self(path), module, module)
            return
        if self(path):
            _at(root, self(path), module)
        for name, parameter in module._parameters.items():
            _put(root, self(_joined(path, name)), parameter, module)
        for name, buffer in module._buffers.items():
            _put(root, self(_joined(path, name)), buffer, module, name not in getattr(module, _UNSAVED))
        for name, child in module._modules.items():
            if child is not None:
                self._place(_joined(path, name), child, root)


def tensor_names(module: nn.Module) -> list[str]:
    """Return the names of all parameters and buffers of a module."""
    named = [*parameters_by_name(module).items(), *buffers_by_name(module).items()]
    return [name for name, _ in named]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _container(like: nn.Module, name: str = "Module") -> nn.Module:
    """Return an empty module in the mode of another module."""
    made: nn.Module = type(name, (nn.Module,), {})()
    made.training = like.training
    return made


def _at(root: nn.Module, path: str, like: nn.Module) -> nn.Module:
    """Return the module at a path in the root; make the modules that are missing, in the mode of ``like``."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, _container(like))
        inner = root._modules[name]
        assert inner is not None
        root = inner
    return root


def _put(root: nn.Module, path: str, value: object, like: nn.Module, persistent: bool = True) -> None:
    """Register a module or a tensor at a path of the root. ``like``: as in ``_at``."""
    outer, _, name = path.rpartition(".")
    owner = _at(root, outer, like)
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter) or value is None:
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value, persistent)  # type: ignore[arg-type]
