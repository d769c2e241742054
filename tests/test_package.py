"""The package as others get it: built, installed away from the checkout, type-checked, and extended by other packages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
SOURCES = ["graphreg", "passes", "tests", "docs", "examples", "benchmarks", ".ci", "pyproject.toml", "README.md", "CHANGELOG.md",
           "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "MANIFEST.in"]  # fmt: skip
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command: object, cwd: Path) -> str:
    """What a command prints; fails with its errors."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class Place:
    """An environment that knows torch and what is put in it, and nothing of the checkout."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site(self) -> Path:
        return next((self.root / "lib").glob("python*")) / "site-packages"

    def install(self, *wheels: Path) -> None:
        run(*PIP, "install", "--no-deps", "--no-index", "--upgrade", "--target", self.site, *wheels, cwd=self.root)

    def says(self, code: str, cwd: Path | None = None) -> str:
        return run(self.python, "-c", code, cwd=cwd or self.root)


def place(root: Path) -> Place:
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root.parent)
    made = Place(root)
    # a path alone: the .pth files in it, an editable install's among them, are not read
    (made.site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return made


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout."""
    root = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (TOP / name).is_dir():
            shutil.copytree(TOP / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(TOP / name, root / name)
    return root


@pytest.fixture(scope="session")
def built(source: Path) -> Path:
    """The folder with the sdist and the wheel made from it."""
    out = source.parent / f"{source.name}-dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", out, source, cwd=source)
    return out


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="session")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A clean environment with graphreg and other packages in it."""
    made = place(tmp_path_factory.mktemp("clean") / "venv")
    made.install(wheel, by_setuptools(tmp_path_factory.mktemp("theirs")), *(packed(made.root, *other) for other in OTHERS.items()))
    return made


LASSO = """from torch import Tensor
from graphreg import Penalty

class {cls}(Penalty, keys=({key!r},), on="parameters"):
    def __call__(self, w: Tensor) -> Tensor:
        return w.abs().sum()
"""
OTHERS = {
    "fine": LASSO.format(cls="FineLasso", key="fine_lasso"),
    "raises": "raise RuntimeError('no licence')\n",
    "taken": LASSO.format(cls="TakenLasso", key="weight_l2"),
    "option": LASSO.format(cls="OptionLasso", key="penalties"),
    "absent": "import a_package_that_is_not_there\n",
}


def packed(folder: Path, name: str, code: str) -> Path:
    """A wheel of one module that announces itself to graphreg, written by hand as the format has it."""
    path, info = folder / f"{name}_extra-1.2-py3-none-any.whl", f"{name}_extra-1.2.dist-info"
    files = {
        f"{name}_extra.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}-extra\nVersion: 1.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[graphreg.passes]\n{name} = {name}_extra\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD")))
    return path


def by_setuptools(folder: Path) -> Path:
    """A wheel as anybody builds one; its entry point names the class."""
    (folder / "their_lasso.py").write_text(LASSO.format(cls="TheirLasso", key="their_lasso"))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "their-lasso"\nversion = "0.1"\n'
        '[project.entry-points."graphreg.passes"]\nlasso = "their_lasso:TheirLasso"\n[tool.setuptools]\npy-modules = ["their_lasso"]\n'
    )
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder, cwd=folder)
    return next(folder.glob("*.whl"))


# What is built


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    version = re.search(r'__version__ = "(.*)"', (TOP / "graphreg" / "__init__.py").read_text())
    assert version and wheel.name == f"graphreg-{version[1]}-py3-none-any.whl"
    inside = contents(wheel)
    own = {name for name in inside if ".dist-info/" not in name}
    engine = {str(path.relative_to(TOP)) for path in (TOP / "graphreg").rglob("*.py")}
    passes = {f"graphreg/{name}/{path.name}" for name in ("passes", "examples") for path in (TOP / name).glob("*.py")}
    page = {f"graphreg/drawing/page/{path.name}" for path in (TOP / "graphreg" / "drawing" / "page").iterdir()}
    assert own == engine | passes | page | {"graphreg/py.typed", "graphreg/passes/py.typed"}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in inside)


def test_the_sdist_builds_the_same_wheel(source: Path, built: Path, wheel: Path, tmp_path: Path) -> None:
    """The wheel at hand was made from the sdist; this one is made from the sources."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", tmp_path, source, cwd=source)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(source)) for name in ("passes", "tests", "docs", "examples", "benchmarks", ".ci")
              for path in (source / name).rglob("*") if path.is_file()}  # fmt: skip
    assert wanted | {"LICENSE", "Makefile", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_they_are_fit_for_a_registry(built: Path) -> None:
    """Complete metadata, a description that renders, nothing large."""
    files = sorted(built.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)
    assert checked.count("PASSED") == 2, checked
    # What the wheel holds is compared above; no file of it is data, which would not be this small. 31 kB is the largest module.
    assert max(map(len, contents(files[0]).values())) < 48 * 1024
    assert files[0].stat().st_size < 2 * 2**20 and files[1].stat().st_size < 8 * 2**20


def test_the_version_is_one_everywhere() -> None:
    """In the package, the citation file and the changelog, whose newest entry it is."""
    version = re.search(r'__version__ = "(.*)"', (TOP / "graphreg" / "__init__.py").read_text())
    assert version and f"\nversion: {version[1]}\n" in (TOP / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version[1]  # type: ignore[index]


def test_the_oldest_torch_is_one_everywhere() -> None:
    """The range of pyproject.toml, the words of the README and of docs/architecture.md, and what ``make oldest`` installs."""
    required = dict(text.split(">=") for text in PROJECT["project"]["dependencies"])
    vision = next(text for text in PROJECT["project"]["optional-dependencies"]["demo"] if text.startswith("torchvision"))
    readme, makefile, docs = ((TOP / name).read_text() for name in ("README.md", "Makefile", "docs/architecture.md"))
    assert f"torch ≥ {required['torch']} " in readme
    assert f"OLDEST := torch=={required['torch']}.0 torchvision=={vision.partition('>=')[2]}.0\n" in makefile
    assert f"torch {required['torch']}.0" in docs and f"torch ≥ {required['torch']}:" in docs


# Away from the checkout


def test_it_imports_from_any_folder(clean: Place, tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()  # a folder of that name is nothing to graphreg
    code = "import graphreg, graphreg.passes as p; print(graphreg.__file__, p.__file__, p.WeightL2.__module__)"
    code += "; import importlib.util as u; print(u.find_spec('passes') is None)"
    folder = clean.site / "graphreg"
    for cwd, none in ((tmp_path, "False"), (Path("/"), "True")):
        assert clean.says(code, cwd=cwd).split() == [
            str(folder / "__init__.py"), str(folder / "passes" / "__init__.py"), "graphreg.passes.weight_l2", none
        ]  # fmt: skip


def test_the_command_line_and_its_demo(clean: Place, tmp_path: Path) -> None:
    """The demos are in the package, each with the files that it imports by bare names."""
    (entry,) = clean.site.glob("graphreg-*.dist-info/entry_points.txt")
    assert "[console_scripts]\ngraphreg = graphreg.cli.main:main\n" in entry.read_text()
    assert run(clean.python, "-m", "graphreg", "--version", cwd=tmp_path).startswith("graphreg 0.")
    code = "from graphreg.cli.demos import script; print(script('regularizers'), script('penalties'))"
    for path in map(Path, clean.says(code, cwd=tmp_path).split()):
        assert path.parent == clean.site / "graphreg" / "examples" and path.read_text() == (TOP / "examples" / path.name).read_text()


def test_an_editable_install_has_the_passes(source: Path, tmp_path: Path) -> None:
    made = place(tmp_path / "venv")
    run(*PIP, "install", "--no-deps", "--no-build-isolation", "--target", made.site, "--editable", source, cwd=tmp_path)
    # a target folder's .pth files are read where it is a site folder, as here
    assert made.says("import graphreg.passes as p; print(p.__file__)", cwd=tmp_path).strip() == str(source / "passes" / "__init__.py")


USER = '''"""What a user writes on top of graphreg."""

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import graphreg
import graphreg.passes
from graphreg import Noise, Penalty, Site, Splice
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1, WeightL1, WeightL2


class RowNorm(Penalty, keys=("row_norm",), on="parameters"):
    power: float = 1.0

    def check(self) -> None:
        super().check()
        self.require(self.power > 0, "power", "above 0")

    def __call__(self, w: Tensor) -> Tensor:
        return w.flatten(1).abs().sum(dim=1).pow(self.power).mean()


class Shift(Splice, keys=("shift",)):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z + weight * noise.uniform(z)


def wide(site: Site) -> bool:
    return site.shape is not None and site.shape[-1] > 3


def train(model: nn.Module, x: Tensor) -> Tensor:
    module = graphreg.regularize(
        model, RowNorm("*", 0.1, power=2.0), [Shift(wide, 0.1), BernoulliDropout("*", 0.1)], example_inputs=x, hidden_l1=0.1, rng=0
    )
    output, penalties = module(x)
    graphreg.set_strength(module, "row_norm", 0.2)
    with graphreg.noise_on(module.eval()):
        module(x)
    graphreg.set_rng_state(module, graphreg.rng_state(module))
    print(graphreg.report(module), graphreg.names(model), graphreg.plan(graphreg.trace(model), WeightL2("*", 0.1)))
    result = graphreg.as_pass(WeightL1("*", 0.1), hidden_dropout=0.1)(fx.symbolic_trace(model))
    assert isinstance(result, PassResult)
    plain: fx.GraphModule = graphreg.strip(module)
    total: Tensor = plain(x).sum() + torch.stack([*penalties.values()]).sum()
    return total


reveal_type(graphreg.strengths(nn.Linear(1, 1)))
reveal_type(RowNorm("*", 0.1).power)
RowNorm("*", 0.1, powr=2.0)
HiddenL1("*", weight="much")
GaussianNoise(3, 0.1)
'''


def test_a_type_checker_sees_both(clean: Place, tmp_path: Path) -> None:
    """A user's file under --strict: nothing of it is Any, its own classes have a checked constructor."""
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", clean.python, "--cache-dir", tmp_path / "cache", "user.py"]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, check=False)
    last = len(USER.splitlines())
    assert done.stdout.splitlines()[:-1] == [
        f'user.py:{last - 4}: note: Revealed type is "dict[str, float]"',
        f'user.py:{last - 3}: note: Revealed type is "float"',
        f'user.py:{last - 2}: error: Unexpected keyword argument "powr" for "RowNorm"; did you mean "power"?  [call-arg]',
        f'user.py:{last - 1}: error: Argument "weight" to "HiddenL1" has incompatible type "str"; expected "float"  [arg-type]',
        f'user.py:{last}: error: Argument 1 to "GaussianNoise" has incompatible type "int"; expected '
        '"str | Sequence[str] | Callable[[Site], bool]"  [arg-type]',
    ], done.stdout + done.stderr


# Packages of other people

EXTENDED = """
import json, warnings, torch
import graphreg
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    keys = sorted(graphreg.registered())
    again = sorted(graphreg.registered())
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
module = graphreg.regularize(model, fine_lasso=0.5, their_lasso=0.25, weight_l2=0.1, penalties="return")
penalties = module(torch.ones(1, 2)).penalties
wanted = 0.5 * sum(layer.weight.abs().sum() for layer in (model[0], model[2])) / 2
print(json.dumps({
    "keys": keys, "aliases": graphreg.registered().aliases("fine_lasso"),
    "said": [str(w.message) for w in caught if "graphreg" in str(w.message)], "penalties": list(penalties),
    "l2": graphreg.registered()["weight_l2"].__module__, "right": bool(torch.isclose(penalties["fine_lasso"], wanted)),
}))
"""


def test_a_regularizer_of_another_package(clean: Place, tmp_path: Path) -> None:
    """Two are found and their keywords work; four that cannot be loaded are named, each with its package, and harm nothing."""
    told = json.loads(clean.says(EXTENDED, cwd=tmp_path))
    assert told["penalties"] == ["fine_lasso", "their_lasso", "weight_l2"] and told["right"] and told["l2"] == "graphreg.passes.weight_l2"
    assert {"fine_lasso", "their_lasso", "dropout", "weight_l2"} <= set(told["keys"]) and told["aliases"] == ["finelasso"]
    assert not {"taken_lasso", "takenlasso", "optionlasso", "penalties"} & set(told["keys"])
    beginning = "graphreg: the regularizer {0} = {0}_extra of {0}-extra 1.2 was not loaded: "
    assert sorted(told["said"]) == [
        beginning.format("absent") + "ModuleNotFoundError(\"No module named 'a_package_that_is_not_there'\")",
        beginning.format("option")
        + "RegularizerError(\"OptionLasso cannot have the key 'penalties': it is an option of graphreg.regularize.\")",
        beginning.format("raises") + "RuntimeError('no licence')",
        beginning.format("taken")
        + "RegularizerError(\"the key 'weight_l2' of TakenLasso belongs to graphreg.passes.weight_l2.WeightL2 already.\")",
    ]
