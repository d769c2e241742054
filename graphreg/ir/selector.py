"""Finds sites by selector: a string, a sequence of strings, or a function of a site.

A string is ``[!]name-glob[@op-glob][:port-glob][#role]``. If it matches a module's name, it selects
the module's output, but not the values inside the module; with ``**``, it selects these values,
too. A backslash makes the next character part of the name: ``block\\@1``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, suggestions, suggestions_text, warn
from graphreg.ir.site import MARKS, ROLES, Label, Site

Selector = str | Sequence[str] | Callable[[Site], bool]
Missing = Literal["error", "warn", "ignore"]

_GRAMMAR = re.compile(
    r"(?P<exclude>!?)(?P<name>(?:\\.|[^@:#\\])*)(?:@(?P<op>(?:\\.|[^:#\\])+))?(?::(?P<port>(?:\\.|[^#\\])+))?(?:#(?P<role>.*))?", re.DOTALL
)
_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)
# a character class with one character, as which a glob writes a character that matches itself
_ONE_OF = re.compile(r"\[([^]!])\]")
_SPECIAL = re.compile(r"[\\@:#*?\[]|^!|^\s|\s$")


@dataclass(frozen=True)
class Pattern:
    """A selector string, parsed into its parts."""

    text: str
    name: str
    op: str | None
    port: str | None
    role: str | None
    exclude: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse one string of a selector, ``[!]name[@op][:port][#role]``. Raises RegularizerError for anything else."""
        match = _GRAMMAR.fullmatch(text.strip())
        if not match or not text.strip("! "):
            raise RegularizerError(
                f"{text!r} is no selector. Write [!]name[@op][:port][#role], e.g. 'layer4.*', '**@ReLU', '*.weight'."
                + (
                    r" A backslash makes the next character part of the name: \@, \:, \#, \\."
                    if re.search(r"[\\@:#]", text)
                    else ""
                )
            )
        role = match["role"]
        if role is not None and role not in (*ROLES, *MARKS):
            hint = r"Where # is a part of the name, write \#."
            raise RegularizerError(f"{text!r} asks for the role {role!r}; roles are {', '.join((*ROLES, *MARKS))}. {hint}")

        def itself(escape: re.Match[str]) -> str:
            return f"[{escape[1]}]" if escape[1] in "*?[" else escape[1]

        # globs have no backslash: ``\*`` becomes ``[*]``, a class of one character
        name, op, port = (match[part] and _BACKSLASH.sub(itself, match[part]) for part in ("name", "op", "port"))
        return cls(text, name or "**", op, port, role, bool(match["exclude"]))

    @cached_property
    def _glob(self) -> Callable[[str], object]:
        return re.compile(fnmatch.translate(self.name)).match

    @cached_property
    def literal(self) -> str | None:
        """The only name that the pattern matches; None for a pattern with wildcards."""
        plain = _ONE_OF.sub("", self.name)
        return None if set(plain).intersection("*?[") else _ONE_OF.sub(lambda match: match[1], self.name)

    @property
    def lone(self) -> bool:
        """Whether the pattern is ``*`` or ``!*``, which mean the default sites."""
        return self.text.strip("! ") == "*"

    def path(self, module: str) -> bool:
        """Return whether the pattern matches the path of a module."""
        return bool(self._glob(module))

    def names(self, label: Label, site: Site) -> bool:
        """Return whether the pattern matches the name of a label."""
        # a parameter has no port: ':' is part of its name
        if site.kind == "parameter" and self.port is not None:
            return fnmatch.fnmatchcase(label.name, f"{self.name}:{self.port}")
        return label.name == self.literal if self.literal is not None else bool(self._glob(label.name))

    def find(self, sites: Iterable[Site]) -> list[Site]:
        """Return the sites that the pattern matches, selectable or not."""
        return list({id(site): site for _, site in self.labels(sites)}.values())

    def labels(self, sites: Iterable[Site]) -> list[tuple[Label, Site]]:
        """Return the matching labels with their sites. A pattern without ``**`` matches no values inside a module whose name it matches."""

        def filters(label: Label, site: Site) -> bool:
            return (self.op is None or fnmatch.fnmatchcase(label.op, self.op)) and self.role in (None, *site.marked)

        def takes_port(label: Label) -> bool:
            return label.default if self.port is None else any(fnmatch.fnmatchcase(port, self.port) for port in label.ports)

        named = [(label, site) for label, site in _candidates(self, sites) if filters(label, site) and self.names(label, site)]
        matching = [(label, site) for label, site in named if site.kind == "parameter" or takes_port(label)]
        if "**" not in self.name:
            modules = {label.module for label, site in named if label.module is not None and site.kind == "value"}
            matching = [(label, site) for label, site in matching if site.kind == "parameter" or not _within(label.name, modules)]
        return matching


class SitesByName(tuple[Site, ...]):
    """Sites in which a pattern without wildcards finds its labels at once, however many sites there are."""

    @cached_property
    def by_name(self) -> dict[str, list[tuple[Label, Site]]]:
        """The labels with this name, with their sites, in the order of the sites."""
        by_name: dict[str, list[tuple[Label, Site]]] = {}
        for site in self:
            for label in site.labels:
                by_name.setdefault(label.name, []).append((label, site))
        return by_name


def _candidates(pattern: Pattern, sites: Iterable[Site]) -> Iterable[tuple[Label, Site]]:
    """Return the labels that a pattern may match, with their sites; without an index, those are all labels."""
    literal, port = pattern.literal, pattern.port
    if not isinstance(sites, SitesByName) or literal is None or (port is not None and set(port).intersection("*?[")):
        return ((label, site) for site in sites for label in site.labels)
    named = sites.by_name.get(literal, ())
    # ":" may also be a part of a parameter's name
    if port is None or not (parameters := sites.by_name.get(f"{literal}:{port}")):
        return named
    return sorted((*named, *parameters), key=lambda labelled: sites.index(labelled[1]))


def exactly(label: Label) -> str:
    """Return the selector string that matches this label and nothing else: its name with special characters escaped, and its port."""
    name, port = map(escaped, (label.name, label.ports[0]))
    return name if label.default else f"{name}:{port}"


def escaped(name: str) -> str:
    """Return a name as a selector string that matches it alone, with special characters escaped."""
    return _SPECIAL.sub(_taken_as_is, name)


def _taken_as_is(match: re.Match[str]) -> str:
    # brackets, because white space around a selector is stripped
    return f"[{match[0]}]" if match[0].isspace() else f"\\{match[0]}"


def strings_of(sites: Iterable[Site]) -> list[str]:
    """Return a selector string for every label of the sites, for suggestions."""
    return [exactly(label) for site in sites for label in site.labels]


def _within(name: str, modules: set[str]) -> bool:
    """Return whether a name belongs to something inside one of the modules."""
    end = name.rfind(".")
    while end > 0:
        if name[:end] in modules:
            return True
        end = name.rfind(".", 0, end)
    return False


def strings(selector: Selector) -> tuple[str, ...]:
    """Return the strings of a selector after checking them; () for a function. Raises RegularizerError if the selector is not valid."""
    if isinstance(selector, str):
        texts: tuple[object, ...] = (selector,)
    elif isinstance(selector, Sequence):
        texts = tuple(selector)
    elif callable(selector) and not isinstance(selector, (type, nn.Module)):
        return ()
    else:
        number: object = selector
        quoted = f"If {number} is a name, put it in quotes: '{number}'. " if type(number) is int else ""
        raise RegularizerError(
            f"a selector is a string, a sequence of strings or a function of a site, not {selector!r}. {quoted}"
            "The selector comes first and the weight second: Regularizer('layer4.*', 0.1)."
        )

    if not texts or not all(isinstance(text, str) for text in texts):
        number = next((text for text in texts if type(text) is int), None)
        quoted = f" If {number} is a name, put it in quotes: '{number}'." if number is not None else ""
        raise RegularizerError(f"a selector is one string or several, not {selector!r}.{quoted} '*' means the default sites.")

    for text in texts:
        Pattern.parse(str(text))
    return tuple(str(text) for text in texts)


def select(
    selector: Selector,
    sites: Sequence[Site],
    default: Sequence[Site],
    *,
    what: str = "value",
    model: str = "the model",
    missing: Missing = "error",
    who: str = "the regularizer",
    usual: str = "the default sites",
    elsewhere: Sequence[Site] = (),
    hint: Callable[[str], str] = lambda text: "",
) -> dict[Site, str]:
    """Find the sites that a selector selects.

    Args:
        selector: A string, a sequence of strings, or a function of a site.
        sites: The candidates.
        default: The sites that the selector ``"*"`` selects.
        what: The kind of site, for messages.
        model: The name of the model, for messages.
        missing: What to do when the selector, or one of its strings, matches nothing.
        who: The regularizer or option that the selector belongs to, for messages.
        usual: The default sites in words, for messages.
        elsewhere: Sites of the other kind (values or parameters). It is no error if a string with
            ``!`` matches only these.
        hint: Returns a sentence to append to the error about a string that matches nothing.

    Returns:
        The selected sites in graph order, each with the string that matched it first.

    Raises:
        NoMatchError: Nothing matches, and ``missing`` is ``"error"``.
    """
    if callable(selector):
        return _by_function(selector, sites, f"of {who} chooses no {what} of {model}", missing)
    texts, sites, elsewhere = strings(selector), SitesByName(sites), SitesByName(elsewhere)
    none_usual = _usual(who, usual, what, model, [site for site in sites if site.norm and site.role == "hidden"])

    def why(pattern: Pattern, matched: Sequence[Site]) -> str:
        nothing = none_usual if pattern.lone else _nothing(pattern, matched, sites, what, model, who, elsewhere)
        return nothing + hint(pattern.text)

    if not default and all(pattern.exclude and not pattern.lone for pattern in map(Pattern.parse, texts)):
        complain(none_usual, missing)
    wanted, excluded = _by_strings(texts, sites, default, elsewhere, why, missing)
    if wanted and excluded.issuperset(wanted):
        complain(f"{list(texts)} leaves no {what} of {model}: what is selected is taken away again by '!'.", missing)
    return {site: wanted[id(site)] for site in sites if id(site) in wanted and id(site) not in excluded}


def select_among(selector: str, sites: Sequence[Site]) -> list[Site]:
    """Return those of the sites that one string matches; ``"*"`` matches all of them."""
    pattern = Pattern.parse(selector)
    return list(sites) if pattern.lone else pattern.find(sites)


def _by_strings(
    texts: Sequence[str],
    sites: Sequence[Site],
    default: Sequence[Site],
    elsewhere: Sequence[Site],
    why: Callable[[Pattern, Sequence[Site]], str],
    missing: Missing,
) -> tuple[dict[int, str], set[int]]:
    """Return the ids of the sites that the strings select, each with its string, and the ids of the sites that they exclude.

    ``why`` returns the message for a string that matches nothing. If all strings begin with ``!``,
    the selection is the default sites without those that the strings match.
    """
    patterns = [Pattern.parse(text) for text in texts]
    wanted = {id(site): "*" for site in default} if all(pattern.exclude for pattern in patterns) else {}
    excluded: set[int] = set()
    for pattern in patterns:
        matched = list(default) if pattern.lone else pattern.find(sites)
        usable = [site for site in matched if site.selectable]
        if not (usable or _needless(pattern, matched, sites, elsewhere)):
            complain(why(pattern, matched), missing)
        if pattern.exclude:
            excluded.update(map(id, usable))
        else:
            for site in usable:
                wanted.setdefault(id(site), pattern.text)
    return wanted, excluded


def _by_function(selector: Callable[[Site], bool], sites: Sequence[Site], none: str, missing: Missing) -> dict[Site, str]:
    chosen = {site: _title(selector) for site in sites if site.selectable and _chooses(selector, site)}
    if not chosen:
        complain(f"the selector {_title(selector)} {none}. It is called with each site; graphreg.names(model) lists them.", missing)
    return chosen


def _chooses(selector: Callable[[Site], bool], site: Site) -> bool:
    """Return whether the user's function selects a site. Raises RegularizerError if the function raises."""
    try:
        return bool(selector(site))
    except GraphRegError:
        raise
    except Exception as error:
        shape = "no shape is known (give example_inputs)" if site.shape is None else f"shape {site.shape}"
        name, first = f"<{_title(selector).strip('<>')}>", str(error).partition("\n")[0]
        what = f"{site.name!r} ({site.kind}, op {site.op}, {shape})"
        raise RegularizerError(
            f"the selector {name} raised {type(error).__name__}: {first} when it was called with the site {what}. It is called "
            "with every site of the model; return False for those that it does not select."
        ) from error


def unmatched(selector: Selector, sites: Sequence[Site], default: Sequence[Site], elsewhere: Sequence[Site] = ()) -> tuple[str, ...]:
    """Return the strings of a selector that match nothing, by the rules of ``select``; for a function that selects nothing, its name."""
    if callable(selector):
        return () if any(site.selectable and _chooses(selector, site) for site in sites) else (_title(selector),)
    lost, sites, elsewhere = [], SitesByName(sites), SitesByName(elsewhere)
    for text in strings(selector):
        pattern = Pattern.parse(text)
        matched = default if pattern.lone else pattern.find(sites)
        if not (any(site.selectable for site in matched) or _needless(pattern, matched, sites, elsewhere)):
            lost.append(text)
    return tuple(lost)


def _needless(pattern: Pattern, matched: Sequence[Site], sites: Sequence[Site], elsewhere: Sequence[Site]) -> bool:
    """Return whether a pattern may match nothing: it excludes what is not selected anyway, such as a bias in a penalty on weights.

    It may also exclude by a role or mark that none of the sites that it names has, so that one
    selector with ``!#normed`` serves models with and without batch norm.
    """
    if not pattern.exclude or pattern.lone:
        return False
    return bool(matched or pattern.find(elsewhere) or (pattern.role and replace(pattern, role=None).find(sites)))


def complain(sentence: str, missing: Missing) -> None:
    """Raise NoMatchError, warn or do nothing, as ``missing`` says."""
    if missing == "error":
        raise NoMatchError(sentence)
    if missing == "warn":
        warn(sentence)


def _usual(who: str, usual: str, what: str, model: str, norms: Sequence[Site]) -> str:
    """Return the message for ``*`` in a model without default sites."""
    left_out = f"; it has hidden outputs of norms ({len(norms)}), which '**#hidden' selects" if norms and what == "value" else ""
    return (
        f"{model} has none of the default sites of {who} ({usual}){left_out}. Name a {what} by a selector instead; "
        "graphreg.names(model) lists them."
    )


def _title(selector: Callable[[Site], bool]) -> str:
    return f"<{getattr(selector, '__name__', type(selector).__name__)}>"


def _nothing(
    pattern: Pattern, matched: Sequence[Site], sites: Sequence[Site], what: str, model: str, who: str, elsewhere: Sequence[Site]
) -> str:
    """Return the message for a string that matches nothing: the likely reason, and suggestions."""
    start = f"{pattern.text!r} matches no {what} of {model}."
    end = " List all: graphreg.names(model)."

    # It matches what cannot be regularized.
    if matched:
        reasons = ", ".join(f"{site.name} ({site.why_not})" for site in matched[:3])
        elements = [exactly(label) for site in sites for label in site.labels if site.selectable and pattern.names(label, site)]
        elements_text = f" Write a part of it: {', '.join(elements[:6])}." if elements and pattern.port is None else ""
        return f"{start} It finds only what cannot be regularized: {reasons}.{elements_text}{end}"

    # It means something else than it says: a name with special characters.
    bare = pattern.text.strip().removeprefix("!")
    if _SPECIAL.search(bare) and (literal := [label for site in sites for label in site.labels if label.name == bare]):
        exact = exactly(literal[0])
        return f"{start} A site has that very name: write {exact} (in Python r'{exact}'), for {bare} asks for something else.{end}"

    # The name is there, but not with this op, port or role.
    named = [(label, site) for site in sites for label in site.labels if pattern.names(label, site)]
    if pattern.role and sites and sites[0].kind == "parameter":
        return f"{start} #{pattern.role} is a role of values, and {who} acts on a {what}; leave the role out.{end}"
    if named and (pattern.op or pattern.port or pattern.role):
        there = sorted({label.op for label, _ in named})
        ops = ", ".join(list(dict.fromkeys([*suggestions(pattern.op or "", there), *there]))[:6])
        ports = ", ".join(sorted({p for label, _ in named for p in label.ports})[:6])
        roles = ", ".join(sorted({mark for _, site in named for mark in site.marked})) or "none"
        return f"{start} The name exists, but not with this op, port or role. It has: ops {ops}; ports {ports}; roles {roles}.{end}"

    if named:
        texts = ", ".join(exactly(label) for label, _ in named[:6])
        return f"{start} It has several ports; write one of {texts}.{end}"

    # Nothing has the name here, but something elsewhere may.
    others = pattern.find(elsewhere)
    if others:
        kind = "parameters" if others[0].kind == "parameter" else "values"
        start += f" It names {kind} ({', '.join(site.name for site in others[:3])}), and {who} acts on a {what}."

    known = strings_of((*sites, *elsewhere) if pattern.exclude else [site for site in sites if site.selectable])
    near = suggestions_text(pattern.name, known)
    # ``blok.*`` is meant for what is inside a module
    outer = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in known if "." in name)
    if pattern.name.endswith(".*") and (inside := suggestions_text(pattern.name, outer)):
        near = inside
    return f"{start}{near}{end}"
