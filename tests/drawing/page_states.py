"""What a page can look like: the states that tests, and whoever looks at screenshots, go through in both themes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

import graphreg
from browser import Page
from drawn_nets import GPT
from drawn_pages import IDS, drawn
from graphreg import Plan

# By name: the page, and what is done there.
STATES = {
    "start": ("lstm", ""),
    "repeats": ("gpt", ""),
    "unfolded": ("gpt", "for (const key of ['h/', 'h.3/', 'h.3.mlp/']) graphreg.toggle(key); graphreg.go('h.3.ln1')"),
    "a node": ("lstm", "graphreg.choose('rnn')"),
    "a module": ("again", "graphreg.choose('twice/')"),
    "a regularizer": ("lstm", "document.querySelector('[data-rule]').click()"),
    "a selector": ("gpt", "type('selector', 'h.[34].** wte'); document.getElementById('asrecipe').open = true"),
    "a wrong selector": ("gpt", "type('selector', 'h.[34')"),
    "a refused selector": ("gpt", "pick('HeadDropout'); type('selector', 'h.3.*')"),
    "an unsure line": ("lstm", "pick('LockedDropout'); type('selector', 'embed')"),
    "stubs": ("masked", "graphreg.toggle('h/'); graphreg.toggle('h.3/'); graphreg.choose('h.4/')"),
    "a search": ("gpt", "type('search', 'ln')"),
    "compared": ("compared", "graphreg.toggle('h/'); graphreg.toggle('h.0/'); graphreg.go('h.0.ln1')"),
    "values": ("values", "graphreg.choose('relu')"),
    "code": ("gpt", "for (const one of ['nav [data-key=c]', '[data-line]']) document.querySelector(one).click(); graphreg.go('h.3.ln1')"),
}
TYPE = "const pick = (cls) => document.querySelector(`#kind [title=${cls}]`).selected = true;"
TYPE += "const type = (id, text) => { const box = document.getElementById(id); box.value = text; box.dispatchEvent(new Event('input')); };"


@cache
def path(folder: Path, name: str) -> Path:
    """The file of a page, made once."""
    if name == "compared":
        return compared(folder)
    return valued(folder) if name == "values" else drawn(folder, name)


@cache
def compared(folder: Path) -> Path:
    """Two plans for one model: dropout is less, noise more, and a penalty is stronger in the second."""
    traced = graphreg.trace(GPT(3), IDS)
    first, second = ({"dropout": {"h.*.ln1": 0.1}, "weight_l2": 1e-4}, {"noise": {"h.*.ln1": 0.1}, "weight_l2": 1e-3})
    return graphreg.draw(planned(traced, second), folder / "compared.html", against=planned(traced, first))


def planned(traced: graphreg.Traced, keywords: dict[str, object]) -> Plan:
    return graphreg.plan(traced, graphreg.from_kwargs(traced, **keywords))


@cache
def valued(folder: Path) -> Path:
    """A small network, and the values that a monitor wrote while it trained."""
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    for name, layer in (("body", torch.nn.Linear(4, 8)), ("relu", torch.nn.ReLU()), ("head", torch.nn.Linear(8, 2))):
        net.add_module(name, layer)
    module = graphreg.regularize(net, hidden_dropout=0.2, hidden_l1=0.1, rng=0)
    with graphreg.monitor(module, ["relu", "body"], file=folder / "values.jsonl"):
        for scale in (1.0, 2.0, 3.0):
            module(scale * torch.ones(5, 4))
    return graphreg.draw(module, folder / "values.html", values=folder / "values.jsonl")


def opened(folder: Path, state: str, theme: str) -> Page:
    """A page in a state and a theme."""
    name, script = STATES[state]
    page = Page(path(folder, name))
    page.run(f"document.documentElement.dataset.theme = {json.dumps(theme)}; {TYPE} {script}")
    return page
