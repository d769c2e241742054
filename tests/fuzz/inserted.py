"""A model, and the same with something inserted that changes no value: the names of what was there, and its masks, stay.

Inserted are an ``nn.Identity``, a layer or a function whose result nobody reads, and a wrapper around a layer. docs/selectors.md says
what moves: behind a function of a name that the model has, the functions of that name count from one more; a layer in a wrapper has
another first name, so that its masks are others.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import graphreg
from fuzz.cases import Discarded, backward, forgotten, loaded
from fuzz.generate import generate
from fuzz.judge import Fault, Verdict, alike, broken, refusal, seeded
from fuzz.program import Plain, Program
from graphreg.errors import GraphRegError
from graphreg.passes import BernoulliDropout, GaussianNoise

HOWS = ("identity", "dead layer", "dead function", "dead function of a name that is there", "wrapped layer")
_LAYER = re.compile(
    r"^        self\.(\w+) = (nn\.(?:Linear|ReLU|Tanh|GELU|Sigmoid|SiLU|LayerNorm|Conv1d|BatchNorm1d)\(.*\))$", re.MULTILINE
)


@dataclass
class Change:
    """``text``: the changed source; ``new``: a pattern of the names that it may have besides; ``base``: of what name functions move."""

    text: str
    new: str
    base: str = ""
    renamed: tuple[str, str] = ("", "")  # the beginnings of parameters' names


def judge_inserted(seed: int) -> tuple[Verdict, str]:
    """What came of it, and the two sources. Raises Discarded where nothing can be inserted."""
    rng = random.Random(f"{seed} inserted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = generate(seed, "calm")
        plain, how = Plain(program).text(), rng.choice(HOWS)
        change = _changed(program, plain, how, rng)
        about = f"# {how}\n{plain}\n\n# With it:\n{change.text}"
        try:
            _compare(plain, change, rng, seed)
        except GraphRegError as error:
            return refusal("inserted", error), about
        except Fault as fault:
            return Verdict("fault", f"{fault.kind}, {how}", fault.detail), about
        except Discarded:
            raise
        except Exception as error:
            return broken("inserted", error), about
    return Verdict("fine"), about


def _changed(program: Program, text: str, how: str, rng: random.Random) -> Change:
    """The source with one thing inserted into the root's forward."""
    before, marker, root = text.rpartition("class Net(nn.Module):")
    head, forward, body = root.partition("    def forward(")
    signature, _, rest = body.partition("\n")
    lines, ends, after = rest.partition("\n\n\ndef model():")
    lines_of = lines.split("\n")
    places = [i for i, line in enumerate(lines_of) if re.match(r"        (\w+) = (?!rest)", line)]
    if how == "wrapped layer":
        layers = [found for found in _LAYER.finditer(head) if f"self.{found[1]}.weight" not in head]  # not a tied one
        if not layers:
            raise Discarded("no layer to wrap")
        layer = rng.choice(layers)
        head = head.replace(layer[0], f"        self.{layer[1]} = Wrap({layer[2]})")
        before = before.replace("import Both, Pair", "import Both, Pair, Wrap")
        named = re.sub(rf"'{layer[1]}\.(weight|bias)'", rf"'{layer[1]}.inner.\1'", body)  # by its path, as where it is frozen
        made = before + marker + head + forward + named
        return Change(made, rf"{layer[1]}\.inner(_\d+)?", renamed=(f"{layer[1]}.", f"{layer[1]}.inner."))
    if not places:
        raise Discarded("no statement")
    at = rng.choice(places)
    name = re.match(r"        (\w+) = ", lines_of[at])[1]  # type: ignore[index]
    if "," in lines_of[at].partition(" = ")[0] or name.endswith("_all") or "getattr" in lines_of[at]:
        raise Discarded("no single value")
    own = {"identity": "nn.Identity()", "dead layer": "nn.ReLU()"}
    new, base = "inserted", ""
    if how in own:
        head = head.rstrip("\n") + f"\n        self.inserted = {own[how]}\n\n"
        line = f"        {name if how == 'identity' else 'unread'} = self.inserted({name})"
    else:
        base = "erf" if how == "dead function" else rng.choice(("mul", "add", "relu", "tanh", "sigmoid", "neg"))
        new = base if how == "dead function" else ""
        called = {"mul": "{a} * 3.0", "add": "{a} + 3.0", "neg": "-{a}"}.get(base, f"torch.{base}({{a}})")
        line = f"        unread = {called.format(a=name)}"
        base = "" if how == "dead function" else base
    lines_of.insert(at + 1, line)
    return Change(before + marker + head + forward + signature + "\n" + "\n".join(lines_of) + ends + after, new, base)


def _compare(plain: str, change: Change, rng: random.Random, seed: int) -> None:
    one, inputs = _made(plain, f"plain_{seed}")
    other, _ = _made(change.text, f"inserted_{seed}")
    _same_parameters(one, other, change)
    try:
        seeded(8)
        expected = one.eval()(*inputs())
        seeded(8)
        got = other.eval()(*inputs())
    except Exception as error:  # of a value that is no tensor
        raise Discarded(str(error)) from error
    alike(got, expected, "the plain models' outputs", "the fuzzer's own")
    _same_parameters(one, other, change)  # a batch norm has moved on
    sites = [[site for site in graphreg.trace(m, inputs(), "symbolic").values if site.selectable] for m in (one, other)]
    before, after = ([label.text for site in each for label in site.labels] for each in sites)
    moved = _moved(before, after, change)
    firsts = {site.name for site in sites[1]}
    there = [site.name for site in sites[0] if site.used and site.name in firsts and site.name not in moved]
    chosen = rng.sample(there, min(len(there), 3))
    regs = [*(BernoulliDropout(site, 0.5) for site in chosen[:2]), *(GaussianNoise(site, 0.3) for site in chosen[2:])]
    answers = []
    for model in (one, other):
        seeded(9)
        module = graphreg.regularize(copy.deepcopy(model).train(), *regs, example_inputs=inputs(), front_end="symbolic", rng=5)
        seeded(9)
        output = module(*inputs()).output
        loss = backward(output)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in module.parameters()] if loss.requires_grad else []
        answers.append((output, [g for g in grads if g is not None]))
    alike(answers[1][0], answers[0][0], "the output with masks", "masks", exact=True)
    alike(answers[1][1], answers[0][1], "the gradients with masks", "masks")


def _moved(before: list[str], after: list[str], change: Change) -> set[str]:
    """The names that may have moved. Raise Fault where another one did."""
    if not change.base:
        lost = [name for name in before if name not in after]
        more = [name for name in after if name not in before and not re.fullmatch(change.new, name)]
        if lost or more:
            raise Fault("names", f"{lost} are lost, {more} are new")
        return set()
    counted = re.compile(rf"{change.base}(_\d+)?")
    one, other = ([n for n in names if not counted.fullmatch(n)] for names in (before, after))
    if one != other:
        raise Fault("names", f"{one}, and now {other}")
    ours, theirs = ([n for n in names if counted.fullmatch(n)] for names in (before, after))
    if len(theirs) not in (len(ours), len(ours) + 1):
        raise Fault("names", f"{ours}, and now {theirs}")
    return set(ours)


def _made(text: str, name: str) -> tuple[nn.Module, Any]:
    try:
        space = loaded(text, name)
        model = space["model"]()
        given = space["inputs"]()
    finally:
        forgotten(name)
    return model, lambda: tuple(x.clone() for x in given)


def _same_parameters(one: nn.Module, other: nn.Module, change: Change) -> None:
    there = dict([*other.named_parameters(remove_duplicate=False), *other.named_buffers(remove_duplicate=False)])
    plain = [*one.named_parameters(remove_duplicate=False), *one.named_buffers(remove_duplicate=False)]
    old, new = change.renamed
    with torch.no_grad():
        for name, value in plain:
            there[new + name.removeprefix(old) if old and name.startswith(old) else name].copy_(value)


__all__ = ["HOWS", "judge_inserted"]
