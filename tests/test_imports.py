"""Who may import whom, what `import jaxalign` costs, and that every registered name exists."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxalign import registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxalign"

# A row never imports a row to its right; parts of one row do not import each other.
ROWS = [
    {"errors", "extras", "types", "registry", "yaml_layers", "config", "progress", "stats", "text_stats"},
    {"sharding", "distributed", "models", "data", "objectives"},
    {"train", "sampling"},
    {"rl"},
    {"llm"},
    {"pages"},
    {"synth", "judges", "rewrite"},
    {"evals"},
    {"serve", "plan", "preflight", "doctor", "terminal", "quickstart", "api", "cli"},
]
# Plain modules of the first and the last row may use their neighbours.
LOOSE_ROWS = (0, len(ROWS) - 1)
# Both of the second row, but a model is loaded onto a mesh.
NEIGHBOURS = {("models", "sharding")}

FENCES = {
    "flax": ("models/",),
    "transformers": ("data/chat.py", "models/"),
    "httpx": ("llm/http.py", "serve/"),
    "requests": (),
    "torch": (),
    "peft": (),
    "trl": (),
}


def _sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module, with its line, wherever in the file it is imported."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides which row it reaches"
            yield node.module or "", node.lineno
            if node.module == "jaxalign":
                yield from ((f"jaxalign.{alias.name}", node.lineno) for alias in node.names)


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _row(part: str) -> int:
    return next(i for i, row in enumerate(ROWS) if part in row)


def test_every_module_has_a_row():
    known = set().union(*ROWS) | {"__init__", "__main__"}
    assert {_part(p) for p in _sources()} <= known


def test_imports_go_from_right_to_left():
    wrong = []
    for path in _sources():
        part = _part(path)
        if part in ("__init__", "__main__"):
            continue
        for module, line in _imports(path):
            target = module.removeprefix("jaxalign.").split(".")[0]
            if not module.startswith("jaxalign.") or target == part or target not in set().union(*ROWS):
                continue
            mine, theirs = _row(part), _row(target)
            allowed = theirs < mine or (theirs == mine and mine in LOOSE_ROWS) or (part, target) in NEIGHBOURS
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {target}")
    assert wrong == []


@pytest.mark.parametrize(("module", "homes"), FENCES.items(), ids=list(FENCES))
def test_a_library_stays_behind_its_fence(module, homes):
    wrong = []
    for path in _sources():
        place = path.relative_to(PACKAGE).as_posix()
        inside = any(place == home or (home.endswith("/") and place.startswith(home)) for home in homes)
        wrong += [
            f"{place}:{line}" for name, line in _imports(path) if name.split(".")[0] == module and not inside
        ]
    assert wrong == []


def test_orbax_is_imported_in_one_module():
    users = {
        p.relative_to(PACKAGE).as_posix() for p in _sources() for m, _ in _imports(p) if m.startswith("orbax")
    }
    assert len(users) == 1


def _modules_after(code: str) -> set[str]:
    show = "\nimport sys; print('\\nMODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^MODULES (.*)$", done.stdout, re.MULTILINE)[0].split())


HEAVY = {
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "numpy",
    "transformers",
    "datasets",
    "torch",
    "pandas",
    "grain",
}


def test_importing_the_package_imports_nothing_else():
    loaded = _modules_after("import jaxalign; jaxalign.__all__; dir(jaxalign)")
    assert not {m.split(".")[0] for m in loaded} & (HEAVY | {"typer", "rich", "pydantic", "yaml", "httpx"})


def test_help_imports_nothing_heavy():
    code = (
        "from jaxalign import cli\ntry: cli.app(['--help'])\nexcept SystemExit as end: assert end.code == 0"
    )
    assert not {m.split(".")[0] for m in _modules_after(code)} & HEAVY


def test_no_module_starts_a_device_or_a_network_client_when_imported():
    """Imports every module of the package, then asks JAX whether a backend was made."""
    names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in _sources()]
    names = [n.removesuffix(".__init__") for n in names if not n.endswith("__main__")]
    code = f"""
import importlib
for name in {names!r}: importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was touched"
"""
    loaded = {m.split(".")[0] for m in _modules_after(code)}
    assert not loaded & {"torch", "peft", "trl"}


REGISTRIES = [(name, r) for name, r in vars(registry).items() if isinstance(r, registry.Registry)]


@pytest.mark.parametrize(
    ("table", "entry"),
    [(r, e) for _, r in REGISTRIES for e in r],
    ids=[f"{n}:{e}" for n, r in REGISTRIES for e in r],
)
def test_every_registered_name_exists(table, entry):
    assert table[entry] is not None


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(Exception, match="unknown training method 'sftt'; did you mean 'sft'"):
        registry.OBJECTIVES["sftt"]


def test_calls_and_subpackages_share_names():
    import jaxalign

    importlib.import_module("jaxalign.train.settings")
    importlib.import_module("jaxalign.plan")
    assert callable(jaxalign.train)
    assert callable(jaxalign.plan)
    assert jaxalign.train.settings.TrainConfig  # type: ignore[attr-defined]
    for name in jaxalign.__all__:
        assert callable(getattr(jaxalign, name)), name


# What a distribution is imported as, where the two names differ.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "orbax-checkpoint": "orbax",
    "tensorboardx": "tensorboardX",
    "huggingface-hub": "huggingface_hub",
    "ml-dtypes": "ml_dtypes",
}


def test_every_imported_library_is_declared_and_every_declared_one_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]
    declared = {IMPORTED_AS.get(n, n) for n in names}
    used = {m.split(".")[0] for p in _sources() for m, _ in _imports(p)}
    used = {m for m in used if m not in sys.stdlib_module_names} - {"jaxalign", "pathwaysutils"}
    assert used - declared == set()
    assert declared - used == set()
