"""The parser of the command line: commands, options and help. It does not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import graphreg
from graphreg.cli.errors import UsageError
from graphreg.cli.regularizer_names import written_keys
from graphreg.errors import suggestions

MODEL = "module:callable or file.py:callable; the callable returns a torch.nn.Module, or is one"
EXAMPLE = """graphreg plan torchvision.models:resnet18 --dropout 'layer4.*=0.1' --weight-l2 '{"strength": 1e-4, "reduction": "sum"}'"""
COMMANDS = {
    "names": "list the sites of a model, or those that a selector finds",
    "plan": "show what regularizers would change, before anything changes",
    "report": "show which regularizer acts where in the regularized model",
    "diff": "compare the regularized model's code with the unregularized model's",
    "draw": "draw a model, regularized or not, to a file",
    "audit": "look over a model's own dropout",
    "groups": "show the parameter groups of an optimizer",
    "doctor": "try which front end takes a model, or test which parts of graphreg work with the torch that is installed",
    "demo": "run the demo",
    "completion": "print the shell code that completes graphreg's commands and options",
}
DEMOS = ("regularizers", "study", "penalties", "ranks")
SHELLS = ("bash", "zsh", "fish")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError and does not exit. For a command with regularizers, any option may name one.

    An option that is no built-in key, such as a class name or a misspelt key, is looked up later,
    when torch has been imported.
    """

    def __init__(self, **options: Any) -> None:
        # No abbreviations: ``--drop`` may be the key of a regularizer that is not imported yet.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; argparse would print the message and exit."""
        raise UsageError(f"{message}. {self.prog} --help shows what is allowed.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse ``args``. An unknown option becomes a regularizer if the command takes regularizers, and raises UsageError otherwise."""
        if self.get_default("keywords") is not None:
            # Before options are added below: these are the names to suggest for a misspelt one.
            self.set_defaults(known=tuple(self._option_string_actions))
            # argparse reads the value of an option only if it knows the option.
            for option in dict.fromkeys(text.partition("=")[0] for text in args or () if text.startswith("--") and len(text) > 2):
                if option not in self._option_string_actions:
                    self.add_argument(option, action=_Keyword, help=argparse.SUPPRESS)
        parsed, rest = super().parse_known_args(args, namespace)
        unknown = next((text.partition("=")[0] for text in rest if text.startswith("-") and text != "-"), None)
        if unknown is not None:
            # The key of a regularizer, for a command such as names, which takes none.
            if unknown.strip("-").replace("-", "_") in written_keys():
                self.error(f"{self.prog} takes no regularizer ({unknown}); plan, report, diff and draw do")
            close = suggestions(unknown.strip("-"), (option.strip("-") for option in self._option_string_actions))
            listed = ", ".join(f"--{option}" for option in close)
            self.error(f"unrecognized option {unknown}" + f". Near options: {listed}" * bool(close))
        return parsed, rest


class _Keyword(argparse.Action):
    """Appends an option and its value to ``namespace.keywords``, which keeps the regularizers in the order given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, "keywords", default=(), metavar="STRENGTH", help=help)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        namespace.keywords = (*namespace.keywords, (option_string, values))


def parser() -> Parser:
    """Build the parser with all commands and their arguments and options."""
    top = Parser(prog="graphreg", description="Regularize a PyTorch model by name, and look at it.", epilog=f"example: {EXAMPLE}")
    top.add_argument("--version", action="version", version=f"graphreg {graphreg.__version__} (torch {version('torch')})")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for command in ("names", "plan", "report", "diff", "draw", "audit"):
        text = COMMANDS[command]
        file = " FILE" if command == "draw" else ""
        regularizers = "" if command in ("names", "audit") else "[--REGULARIZER STRENGTH ...] "
        # The usage that argparse would write lists the option of each regularizer.
        usage = f"graphreg {command} MODEL{file} {regularizers}[options]"
        subparser = commands.add_parser(command, help=text, description=f"{text.capitalize()}.", usage=usage)
        subparser.add_argument("model", metavar="MODEL", help=MODEL)
        if command == "draw":
            subparser.add_argument("path", metavar="FILE", help="the file to write; its extension is the format: .svg, .png, .dot, .html")
            subparser.add_argument("--level", type=int, metavar="DEPTH", help="fold each module at this depth")
            subparser.add_argument("--against", metavar="FILE", help="compare with what this recipe does: what is more, less, otherwise")
            subparser.add_argument("--values", metavar="FILE", help="show what graphreg.monitor(..., file=FILE) wrote, on an .html page")
            subparser.add_argument("--mode", choices=("train", "eval"), default="train", help="the mode whose forward is drawn")

        _add_model_options(subparser)
        if command == "names":
            subparser.add_argument("--select", action="append", metavar="SELECTOR", help="list what this selects; repeatable")
            subparser.add_argument("--on", choices=("values", "parameters"), help="select only values, or only parameters")
            subparser.add_argument("--all", action="store_true", help="list also what is no tensor, such as sizes")
            subparser.add_argument("--source", action="store_true", help="print the model's own code, with the sites that each line makes")
        elif command != "audit":
            _add_regularizers(subparser)
        if command == "plan":
            subparser.add_argument("--save", metavar="FILE", help="write the plan as a recipe: .json, .toml or .yaml")
        if command in ("plan", "report", "diff"):
            subparser.add_argument("--rng", type=int, metavar="SEED", help="the seed of the noise")
        if command in ("report", "diff"):
            subparser.add_argument("--verify", action="store_true", help="first compare the regularized model with the model")

    groups = commands.add_parser("groups", help=COMMANDS["groups"], description=f"{COMMANDS['groups'].capitalize()}.")
    groups.add_argument("model", metavar="MODEL", help=MODEL)
    what = """SELECTOR=frozen, or SELECTOR= and options as JSON: 'head.*={"lr": 0.01}'; repeatable"""
    groups.add_argument("--group", action="append", default=[], metavar="SELECTOR=OPTIONS", help=what)
    groups.add_argument("--default", metavar="JSON", help="""the options of all parameters: '{"lr": 0.001, "weight_decay": 0.05}'""")
    groups.add_argument("--decay", choices=("standard",), help="no weight decay for norms, biases, embeddings and vectors")
    groups.add_argument("--recipe", metavar="FILE", help="a recipe with param_groups; other options take precedence")
    groups.add_argument("--save", metavar="FILE", help="write what was asked as a recipe: .json, .toml or .yaml")
    _add_model_options(groups, inputs=False, front_end=False)

    doctor = commands.add_parser("doctor", help=COMMANDS["doctor"], description=f"{COMMANDS['doctor'].capitalize()}.")
    doctor.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    doctor.add_argument("--torch", action="store_true", help="test torch, without a model")
    _add_model_options(doctor, front_end=False)

    # The commands that take no model.
    made = ", ".join("make demo" if name == DEMOS[0] else f"make demo-{name}" for name in DEMOS)

    demo = commands.add_parser("demo", help=COMMANDS["demo"], description=f"Run a demo ({made}).")
    demo.add_argument("demo", nargs="?", choices=DEMOS, default=DEMOS[0])

    completion = commands.add_parser("completion", help=COMMANDS["completion"], description='bash: eval "$(graphreg completion bash)"')
    completion.add_argument("shell", choices=SHELLS)
    return top


def _add_model_options(subparser: argparse.ArgumentParser, inputs: bool = True, front_end: bool = True) -> None:
    subparser.add_argument("--kwargs", metavar="JSON", help="""the arguments of the callable, e.g. '{"num_classes": 10}'""")
    if inputs:
        subparser.add_argument(
            "--input", action="append", metavar="SHAPE", help="an example input: [name=]1x3x224x224[:dtype]; integers: 'ids=1x16:int64<100'"
        )
        subparser.add_argument("--inputs", metavar="FILE", help="example inputs: a tensor, tuple or dict of tensors that torch.save wrote")
    if front_end:
        choices = ("auto", "symbolic", "export")
        subparser.add_argument("--front-end", choices=choices, default="auto", help="which front end traces the model")
    subparser.add_argument("--json", action="store_true", help="print JSON")
    subparser.add_argument("--traceback", action="store_true", help="show where an error comes from")


def _add_regularizers(subparser: argparse.ArgumentParser) -> None:
    subparser.add_argument(
        "--missing", choices=("error", "warn", "ignore"), default="error", help="what to do when a selector matches nothing"
    )
    subparser.add_argument(
        "--own-dropout", action="append", metavar="CHOICE", help="native dropout: keep, seeded, off or a rate; or GLOB=CHOICE"
    )
    subparser.add_argument("--keep", action="append", metavar="SELECTOR", help="values that a call returns, too; repeatable")
    subparser.add_argument("--recipe", metavar="FILE", help="a recipe that graphreg.save_recipe wrote; other options take precedence")
    group = subparser.add_argument_group(
        "regularizers",
        """STRENGTH, GLOB=STRENGTH, or all options as JSON: '{"strength": 0.1, "pattern": "fc.*"}'; repeatable. STRENGTH is a number,
a schedule, 'linear(0, 0.5, 1000)', or a strength by depth, 'by_depth(0, 0.2)'""",
    )
    for key, line in written_keys().items():
        # argparse formats the help with ``%``.
        group.add_argument(f"--{key.replace('_', '-')}", action=_Keyword, help=line.replace("%", "%%"))
    subparser.set_defaults(keywords=())


@contextmanager
def on_the_path(folder: Path) -> Iterator[None]:
    """Put a folder on ``sys.path`` for a ``with`` block."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # ValueError: the model's code has removed the folder already
            sys.path.remove(str(folder))
