"""Block objects, which stand in a rewritten module for the model's blocks (the modules that ``blocks=`` selects) and their parent modules.

A block object shares the parameters, buffers and mode of the model's module. Its class is derived from the module's class and has the same
name, so that wrapping policies of FSDP and activation checkpointing recognize the object. But its forward runs code that was emitted from
a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from graphreg.blocks.outline import OUTSIDE
from graphreg.blocks.shown_call import BlockCode, call_of_block
from graphreg.compiler.recurrent_lowering import LOWERED
from graphreg.errors import GraphRegError
from graphreg.ir.module_record import ORIGINAL, RULES
from graphreg.torch_internals.hooked_calls import CALL
from graphreg.torch_internals.interpreter import with_own_code
from graphreg.torch_internals.modules import COMPILED_CALL, renew_hooks
from graphreg.torch_internals.torch_modes import is_exporting

BLOCK, MODE = "graphreg_block", "graphreg_mode"  # attributes of a block object: its record; its mode, if it has no record
CALLS = "graphreg_calls"  # the attribute of a placed block that holds its code; see placed_block.py
_MADE_ANEW = (RULES, OUTSIDE, LOWERED, COMPILED_CALL, CALLS)  # attributes that copies and pickles leave out
REPLACED = "{} of the rewritten module was replaced. Put the block back, or regularize the model with the new module."
_classes: WeakKeyDictionary[type, type[Block]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BlockRecord:
    """What a block object knows, in its attribute ``graphreg_block``: its path, the model's module, its mode and its code.

    The calls of a block may have different code, for example because a splice acts in one of two calls. Each different code is a variant.

    Attributes:
        path: The path of the block in the model.
        original: A tuple with the model's module that the object stands for and whose mode it shares; () in a copy and after unpickling.
        mode: Whether the block is in train mode; used only if ``original`` is empty.
        eager: For each variant, the code that runs without torch.compile.
        compiled: For each variant, the code that Dynamo traces.
        sources: The source text of each code in ``eager``.
        called: In place, a tuple with the model's module, which is called and has the hooks; else (), since the block object has them.
    """

    path: str
    original: tuple[nn.Module, ...] = ()
    mode: bool = True
    eager: tuple[BlockCode, ...] = ()
    compiled: tuple[BlockCode, ...] = ()
    sources: tuple[str, ...] = ()
    called: tuple[nn.Module, ...] = ()


class View:
    """A namespace of modules that the code of a block calls. A view is no module, so these modules are not in the block's state_dict."""

    def __init__(self, things: Mapping[str, Any]) -> None:
        self.__dict__.update(things)


class Block(nn.Module):
    """A base of the class of every block object (see this file's docstring). The other base is the class of the model's module."""

    graphreg_kind: type[nn.Module]

    @property
    def training(self) -> bool:
        record = self.__dict__.get(BLOCK)
        if record is None:  # a slice of a block object that is a ModuleList: a new object of its class
            return bool(self.__dict__.get(MODE, True))
        return bool(record.original[0].training if record.original else record.mode)

    @training.setter
    def training(self, mode: bool) -> None:
        record = self.__dict__.get(BLOCK)
        if record is None:
            self.__dict__[MODE] = mode
            return
        if record.original:
            record.original[0].training = mode
        self.__dict__[BLOCK] = replace(record, mode=mode)

    def forward(self, *values: Any, graphreg_keys: Sequence[Any] = (), graphreg_variant: int | None = None) -> Any:
        """Run the emitted code of one variant.

        Args:
            *values: The values from outside of the block that the code reads.
            graphreg_keys: The noise keys from which the code draws.
            graphreg_variant: The number of the variant; None in a call that does not come from the rewritten module.

        Raises:
            GraphRegError: The call does not come from the rewritten module.
        """
        if graphreg_variant is None:
            path = self.__dict__[BLOCK].path if BLOCK in self.__dict__ else ""
            raise GraphRegError(stray_call_refusal(self.graphreg_kind.__name__, path))
        record = self.__dict__[BLOCK]
        if not record.eager:  # a copy of the block alone
            raise GraphRegError(REPLACED.format(f"the block {record.path!r}"))
        codes = record.compiled if torch.compiler.is_dynamo_compiling() and not is_exporting() else record.eager
        code, shown = codes[graphreg_variant]
        return code(self, shown, *values, *graphreg_keys)

    __call__ = nn.Module.__call__  # not that of the module's class: what it does around the forward is in the graph

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name not in _MADE_ANEW}
        if (record := state.get(BLOCK)) is not None:
            # A copy has no link to the model, and gets its code when the copied root generates it.
            state[BLOCK] = BlockRecord(record.path, mode=self.training)
        return _blank, (self.graphreg_kind,), state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _, _, state = self.__reduce_ex__(4)
        twin = _blank(self.graphreg_kind)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin


def stray_call_refusal(kind: str, path: str) -> str:
    """Return the error message for a call that does not come from the rewritten module."""
    return (
        f"{f'{path!r} ({kind})' if path else kind} is a part of a rewritten module, and only that module can call this part, because "
        "emitted code takes other arguments. Call the whole module; to run this part alone, call the same part of the original model."
    )


def _class_of(kind: type[nn.Module]) -> type[Block]:
    """Return the class of the block objects for modules of class ``kind``."""
    # Of a block object or a placed block, this is the user's own class.
    kind = getattr(kind, "graphreg_kind", getattr(kind, ORIGINAL, kind))
    if kind not in _classes:
        contents = {
            "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "graphreg_kind": kind,
            CALL: call_of_block(), "forward": with_own_code(Block.forward),
        }  # fmt: skip
        metaclass: Any = type(kind)
        _classes[kind] = metaclass(kind.__name__, (Block, kind), contents)
    return _classes[kind]


def _blank(kind: type[nn.Module]) -> Any:
    cls = _class_of(kind)
    return cls.__new__(cls)


def original(module: nn.Module) -> nn.Module:
    """Return the model's module that a block object stands for; ``module`` itself if it is no block object or has no original."""
    record = module.__dict__.get(BLOCK)
    return record.original[0] if record is not None and record.original else module


def with_blocks(children: Mapping[str, nn.Module | None], blocks: Iterable[str]) -> dict[str, nn.Module | None]:
    """Return a model's children with block objects in place of the blocks and of the modules that contain blocks."""
    made, new = dict[int, nn.Module](), dict(children)
    # for "layers.0.ff": layers, layers.0 and layers.0.ff, because the parents hold the block
    # object, too
    paths = {".".join(steps[:depth]) for steps in (block.split(".") for block in blocks) for depth in range(1, len(steps) + 1)}
    for path in sorted(paths):
        owner, _, name = path.rpartition(".")
        siblings: Any = new
        for step in owner.split(".") if owner else ():
            siblings = siblings[step]._modules
        module = siblings[name]
        if id(module) not in made:
            made[id(module)] = twin_of(module, path)
        siblings[name] = made[id(module)]
    aliases = {id(original(module)): module for module in made.values()}
    for module in (None, *made.values()):  # a block may be a child of the model (None) or of a parent under further names
        siblings = new if module is None else module._modules
        siblings.update({name: aliases.get(id(child), child) for name, child in siblings.items()})
    return new


def twin_of(module: nn.Module, path: str) -> Block:
    """Make the block object for a module, with the module's own dicts of parameters and buffers, and a copy of its dict of submodules."""
    twin: Block = _blank(type(module))
    source = original(module)
    twin.__dict__.update({name: value for name, value in source.__dict__.items() if name not in (*_MADE_ANEW, "training")})
    twin.__dict__["_modules"] = type(source._modules)(module._modules)
    renew_hooks(twin)  # the twin needs no call hooks: the graph contains their operations
    twin.__dict__[BLOCK] = BlockRecord(path, (source,), source.training)
    return twin


def block_at(root: nn.Module, path: str) -> Block:
    """Return the block object at a path, also if wrappers are around it, such as those of activation checkpointing."""
    for module in root.get_submodule(path).modules():
        if isinstance(module, Block) and (record := module.__dict__.get(BLOCK)) is not None and record.path == path:
            return module
    raise GraphRegError(REPLACED.format(f"the block {path!r}"))


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 (``fully_shard``) was applied to a module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
