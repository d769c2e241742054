"""``graphreg.diff`` compares the emitted Python of a rewritten module with that of its model, or with that of another rewritten module."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graphreg.errors import GraphRegError, RegularizerError, listed, shown
from graphreg.ir.module_record import RULES
from graphreg.ir.terminal import check_width, coloured, marked, paint, width_now
from graphreg.planning.plan import Plan
from graphreg.reporting.report import applied
from graphreg.reporting.source import Line, Source, source
from graphreg.rewriting.strip import without_additions
from graphreg.runtime.noise_keys import key_rule_of
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.controls import strengths_now
from graphreg.session.hosts import backend_host, rewritten, rules_of

Sign = Literal["---", "+++", "@@", "-", "+", " "]
_STYLES: dict[str, str] = {"---": "bold", "+++": "bold", "@@": "cyan", "-": "red", "+": "green"}
_MARGIN = 88  # columns; all comments start in one column, behind the longest commented line of at most this length
_NOTEBOOK = 100  # columns that the output of a notebook shows without scrolling
_MODES = {"both": "", "train": ", in train mode", "eval": ", in eval mode"}


@dataclass(frozen=True)
class DiffLine:
    """A line of a ``Diff``.

    Attributes:
        sign: As in ``diff -u``: ``"---"`` and ``"+++"`` mark the two header lines of a ``forward``, and ``"@@"`` marks the header line of
            a group of lines. ``"-"``, ``"+"`` and ``" "`` mark a line as removed, added or unchanged.
        text: The line as it is printed, with sign and comment.
        code: The line of Python, without sign and comment.
        kind: The kind of addition, or ``"reads"``, ``"rule"`` or ``""``; see ``Line.kind`` in ``source.py``.
        regularizers: The names of the regularizers that the line belongs to.
        sites: The names of the sites that the line belongs to.
    """

    sign: Sign
    text: str
    code: str = ""
    kind: str = ""
    regularizers: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diff:
    """A unified diff of the ``forward`` methods of two modules. ``bool(diff)`` is True if there is a difference.

    ``str(diff)`` has colours if stdout is a terminal and NO_COLOR is not set. Where the terminal, or the environment variable COLUMNS, is
    narrow, comments have lines of their own. ``text()`` has no colours.

    Attributes:
        before: The title of the first module.
        after: The title of the second module.
        lines: The lines of the diff. A ``forward`` without differences has no lines.
        notes: Sentences about differences that the code does not show: in the seeds of the noise, or in the shapes of parameters.
    """

    before: str
    after: str
    lines: tuple[DiffLine, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lines or self.notes)

    @property
    def added(self) -> int:
        """The number of lines that are new or changed."""
        return sum(line.sign == "+" for line in self.lines)

    @property
    def removed(self) -> int:
        """The number of lines that are removed or changed."""
        return sum(line.sign == "-" for line in self.lines)

    def text(self, width: int | None = None) -> str:
        """Return the diff as plain text.

        ``width``: the columns to fit, 40 or more, or None for any number. Comments move to the left, and where that is not enough, a
        comment gets a line of its own. No line of code is broken. Raises RegularizerError for any other value.
        """
        check_width(width)
        return self._shown(width, False)

    def __str__(self) -> str:
        return self._shown(width_now(), coloured())

    __repr__ = __str__

    def _shown(self, width: int | None, colours: bool) -> str:
        lines = [paint(text, _STYLES.get(line.sign, ""), colours) for line, text in _fitted(self.lines, width)]
        return "\n".join([*lines, *self._rest()])

    def _rest(self) -> list[str]:
        """Return the lines of text below the diff: the notes. If no line of code differs, a sentence that says so comes first."""
        none = f"no difference between {self.before} and {self.after}" + " in code, regularizers and strengths" * bool(self.notes)
        return [*([] if self.lines else [none]), *self.notes]

    def _repr_html_(self) -> str:
        lines = [(line.sign[:1] if len(line.sign) < 3 else "", text) for line, text in _fitted(self.lines, _NOTEBOOK)]
        return marked([*lines, *(("", text) for text in self._rest())])

    def to_dict(self) -> dict[str, Any]:
        """Return the diff as plain values that ``json`` can write."""
        return {**asdict(self), "added": self.added, "removed": self.removed}


def _fitted(lines: Sequence[DiffLine], width: int | None) -> Iterator[tuple[DiffLine, str]]:
    """Yield each line as it is printed, or twice, with the code and with the comment, if the two together are wider than ``width``."""
    if width is None or all(len(line.text) <= width for line in lines):
        yield from ((line, line.text) for line in lines)
        return

    codes = [f"{line.sign}{line.code}" if line.code else line.text for line in lines]
    comments = [line.text[len(code) :].strip() for line, code in zip(lines, codes, strict=True)]
    # Comments start behind the longest line of code that has room for its own.
    together = [len(code) for code, comment in zip(codes, comments, strict=True) if comment and len(f"{code}  {comment}") <= width]
    margin = max(together, default=0)
    for line, code, comment in zip(lines, codes, comments, strict=True):
        aligned = f"{code.ljust(margin)}  {comment}"
        if not comment:
            yield line, code
        elif len(f"{code}  {comment}") <= width:
            yield line, aligned if len(aligned) <= width else f"{code}  {comment}"
        else:
            indent = len(line.code) - len(line.code.lstrip())
            yield line, code
            yield line, f"{line.sign}{' ' * indent}    {comment}"


def diff(a: Any, b: Any = None, *, context: int = 3) -> Diff:
    """Compare the Python emitted for ``a`` with the Python emitted for ``b``, or for the model of ``a`` if ``b`` is None.

    If ``b`` is given, the shapes of parameters are compared, too. The seeds of the noise are compared only if neither ``a`` nor ``b`` is a
    plan, because a plan has no seed.

    Args:
        a: A rewritten module, which may be compiled or wrapped; a stripped module; or a plan, which is applied to copies of its graphs.
        b: An object of one of these kinds, or None.
        context: The number of unchanged lines around each change, 0 or more.

    Raises:
        GraphRegError: ``a`` or ``b`` is of another kind, or ``b`` is None and ``a`` cannot be stripped.
        RegularizerError: ``context`` is not allowed.
    """
    if type(context) is not int or context < 0:
        raise RegularizerError(f"context={shown(context)} is not allowed; give a whole number of lines, 0 or more.")

    notes: tuple[str, ...] = ()
    if b is not None:
        first, second = (applied(each) if isinstance(each, Plan) else each for each in (a, b))
        old, new = _source(first), _source(second)
        before, after = f"a: {_title(first, old)}", f"b: {_title(second, new)}"
        notes = tuple(_beside(first, second, a is not first or b is not second))
    else:
        module = applied(a) if isinstance(a, Plan) else a
        new = _source(module)
        # A stripped module is the model, from which it does not differ.
        old = new if _is_stripped(module) else source(without_additions(module), {})
        before, after = new.title, f"{new.title}, regularized" if not _is_stripped(module) else f"{new.title}, stripped"

    lines: list[DiffLine] = []
    for mode in {**old.forwards, **new.forwards}:
        ours, theirs = _forward(old, mode), _forward(new, mode)
        # If one is None, only one of the modules has a single forward. The iterations for "train" and "eval" compare it with the two
        # forwards of the other module.
        if ours is None or theirs is None:
            continue
        lines += _section(ours, theirs, before + _MODES[mode], after + _MODES[mode], context)
    return Diff(before, after, tuple(lines), notes)


def _title(module: Any, source: Source) -> str:
    return f"{source.title}, stripped" if _is_stripped(module) else source.title


def _beside(a: Any, b: Any, planned: bool) -> Iterator[str]:
    """Yield sentences about the differences between two modules in the seeds of the noise and in the shapes of parameters.

    ``planned``: whether one of the modules was made from a plan. A plan has no seed, so seeds are then not compared.
    """
    keys = [None if _is_stripped(module) else key_rule_of(rules_of(module)) for module in (a, b)]
    ours, theirs = ({} if key is None else dict(zip(key.names, key.streams.tolist(), strict=True)) for key in keys)
    other = [] if planned else [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if other:
        yield f"besides the code: the noise is seeded differently ({listed(other)})"

    bare = [module if _is_stripped(module) else rewritten(module) for module in (a, b)]
    shapes, others = ({name: p.shape for name, p in each.named_parameters()} for each in bare)
    pairs = [(name, shapes[name], shape) for name, shape in others.items() if shapes.get(name, shape) != shape]
    if pairs:
        differences = [f"{name} {'x'.join(map(str, old))} and {'x'.join(map(str, new))}" for name, old, new in pairs]
        yield f"besides the code: parameters have other shapes ({listed(differences)})"


def _source(module: Any) -> Source:
    if backend_host(module) is not None:
        raise GraphRegError(
            "a backend has no module whose source could be compared: torch.compile makes the code. graphreg.report(backend) lists its "
            "graphs and what acts in them; diff takes what graphreg.regularize returned."
        )
    if _is_stripped(module):
        return source(module, {})
    try:
        rewritten(module)
    except GraphRegError as error:
        raise GraphRegError(f"{error} With one argument, diff(module) compares the module with its model.") from None
    return source(module, strengths_now(module))


def _is_stripped(module: Any) -> bool:
    return isinstance(module, RewrittenModule) and RULES not in module._modules


def _forward(of: Source, mode: str) -> tuple[Line, ...] | None:
    if mode == "both" and "both" not in of.forwards:
        return None
    return of.forwards.get(mode) or of.forwards["both"]


def _section(ours: Sequence[Line], theirs: Sequence[Line], before: str, after: str, context: int) -> Iterator[DiffLine]:
    groups = list(_Matcher(ours, theirs).get_grouped_opcodes(context))
    if not groups:
        return
    yield DiffLine("---", f"--- {before}")
    yield DiffLine("+++", f"+++ {after}")
    commented = [len(line.code) for line in (*ours, *theirs) if line.comment and len(line.code) <= _MARGIN]
    margin = max(commented, default=0)
    for group in groups:
        first, last = group[0], group[-1]
        yield DiffLine("@@", f"@@ -{_range(first[1], last[2])} +{_range(first[3], last[4])} @@")
        for tag, i, j, k, m in group:
            if tag == "equal":
                yield from (_shown(" ", line, margin) for line in theirs[k:m])
                continue
            yield from (_shown("-", line, margin) for line in ours[i:j])
            yield from (_shown("+", line, margin) for line in theirs[k:m])


def _range(start: int, stop: int) -> str:
    """Format a range of lines as ``diff -u`` does.

    A range is written as its first line and its length. A range of one line is written as this line alone, and an empty range as the line
    before the range and 0.
    """
    length = stop - start
    return f"{start + 1}" if length == 1 else f"{start + (length > 0)},{length}"


def _shown(sign: Sign, line: Line, margin: int) -> DiffLine:
    text = f"{line.code.ljust(margin)}  # {line.comment}" if line.comment else line.code
    return DiffLine(sign, f"{sign}{text}", line.code, line.kind, line.regularizers, line.sites)


class _Matcher(difflib.SequenceMatcher[str]):
    """Matches lines by ``Line.key``, the name that a line assigns. So a line with changed arguments is paired with its old version."""

    def __init__(self, ours: Sequence[Line], theirs: Sequence[Line]) -> None:
        super().__init__(None, [line.key for line in ours], [line.key for line in theirs], autojunk=False)
        self.ours, self.theirs = ours, theirs

    def _texts(self, line: Line) -> tuple[str, str]:
        return line.code, line.comment

    def get_opcodes(self) -> Any:
        """Return the opcodes of difflib, but with ``replace`` for two lines that have the same key and differ in code or comment."""
        opcodes: list[Any] = []
        for tag, i, j, k, m in super().get_opcodes():
            if tag != "equal":
                opcodes.append((tag, i, j, k, m))
                continue
            start = 0
            for n in range(j - i + 1):
                # n == j - i is the end of the stretch, which closes the last equal lines.
                if n == j - i or self._texts(self.ours[i + n]) != self._texts(self.theirs[k + n]):
                    opcodes += [("equal", i + start, i + n, k + start, k + n)] if n > start else []
                    opcodes += [("replace", i + n, i + n + 1, k + n, k + n + 1)] if n < j - i else []
                    start = n + 1
        return opcodes
