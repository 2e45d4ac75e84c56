"""Every command, setting and call in the documents is one that works.

Commands run up to the point where work would begin: options, keys and files are read as in earnest.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jaxalign import api, cli
from jaxalign.config import load_config
from jaxalign.registry import BUILDERS, EVALUATIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/jaxalign quickstart"
TESTS = (
    "python3 -m venv .venv && .venv/bin/pip install -c requirements-dev.txt -e '.[test]' && .venv/bin/pytest"
)


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every fenced block of a language."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: found.start()].count("\n") + 1
            yield f"{page.name}:{line}", found[1]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every `jaxalign` command in documents and example configurations."""
    for where, text in blocks("bash"):
        for line in text.splitlines():
            found = re.search(r"(?:^|[\s/])jaxalign (.*)$", line)
            if found:
                yield where, shlex.split(found[1])
    for path in CONFIGS:
        yield path.name, shlex.split(_header(path)["Command"])[1:]


def _header(path: Path) -> dict[str, str]:
    """The `# Name: text` lines at the top of an example configuration; a line that begins deeper goes on."""
    found: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        start = re.match(r"# (\w+): +(.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name and line.startswith("#  "):
            found[name] += " " + line[1:].strip()
        else:
            break
    return found


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[str]:
    """Names of the API calls that were reached; none of them does its work."""
    reached: list[str] = []

    class Nothing:
        problems: tuple[str, ...] = ()
        facts: tuple[Any, ...] = ()

        def as_dict(self) -> dict[str, Any]:
            return {}

    def stand_in(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            settings = {
                "generate": api.generate_settings,
                "chat": api.generate_settings,
                "serve": api.serve_settings,
            }
            if name in settings:
                about = ("model", "data", "out", "config", "overrides")
                keys = {k: v for k, v in kwargs.items() if k not in about}
                load_config(settings[name](), kwargs.get("config", ()), kwargs.get("overrides", ()), keys)
            for verb, table in (("evaluate", EVALUATIONS), ("build", BUILDERS)):
                if name == verb:
                    load_config(table[args[0]].config, kwargs["config"], kwargs["overrides"])
            reached.append(name)
            empty = {"n_in": 0, "n_out": 0, "dropped": {}, "rejects": {}}
            return empty if name in ("inspect_model", "evaluate", "build") else Nothing()

        return call

    silent = {name: replace(EVALUATIONS[name], lines=lambda report: []) for name in EVALUATIONS}
    monkeypatch.setattr(cli, "EVALUATIONS", silent)
    names = "start plan_of generate chat serve evaluate build export pull inspect_data inspect_model"
    for name in names.split():
        monkeypatch.setattr(api, name, stand_in(name))
    monkeypatch.setattr("jaxalign.quickstart.quickstart", stand_in("quickstart"))
    monkeypatch.setattr("jaxalign.doctor.examine", lambda: reached.append("doctor") or [])
    # The file that docs/configuration.md shows, and the folder of examples, as a reader would have them.
    for where, text in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name, f"{where}: say on the first line how the file is called"
        (tmp_path / name[1]).write_text(text)
    (tmp_path / "more.yaml").write_text("seed: 2\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return reached


@pytest.mark.parametrize(
    ("where", "words"), list(commands()), ids=lambda v: v if isinstance(v, str) else " ".join(v)
)
def test_every_command_in_the_documents_is_understood(where, words, calls):
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, f"{where}: {result.output}"
    assert calls or "--help" in words


@pytest.mark.parametrize(("where", "text"), list(blocks("python")), ids=lambda v: v.split("\n")[0])
def test_every_python_example_runs(where, text, calls, capsys):
    exec(compile(text, where, "exec"), {})
    assert calls or json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(("where", "text"), list(blocks("json")), ids=lambda v: v[:30])
def test_every_row_shown_is_a_row_that_is_understood(where, text):
    from jaxalign.data.formats import to_records

    (record,), _ = to_records(json.loads(text), source="", place=where)
    assert record.messages


def test_the_mistakes_shown_are_the_mistakes_made(calls):
    """docs/configuration.md prints what such a file really gets."""
    (text,) = (t for where, t in blocks("text") if "mistakes" in t)
    example = Path("sft.yaml").read_text()
    broken = example.replace("out: out\nlearning_rate:", "learning_rat:").replace("rank: 8", "rank: big")
    Path("sft.yaml").write_text(broken)
    result = CliRunner().invoke(cli.app, ["train", "sft.yaml", "-o", "out", "rank=4"])
    assert result.exit_code == 2
    assert result.output == text


def test_the_readme_has_the_two_command_lines():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(QUICKSTART) == 1
    assert lines.count(TESTS) == 1


def test_ci_runs_the_readme_s_test_command():
    """The line that .ci/run picks out of the README, by its own expression, is the test command."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (pick,) = re.findall(r"command=\$\((grep [^)]*README\.md)\)", script)
    done = subprocess.run(["bash", "-c", pick], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TESTS
    assert subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT).returncode == 0


def test_links_between_documents_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_change_log_has_its_headings():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^###? .*$", text, re.MULTILINE)[:3] == ["## Unreleased", "### Added", "### Removed"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_an_example_configuration_says_what_it_took_and_what_it_gave(path):
    header = _header(path)
    assert list(header) == ["Command", "Hardware", "Time", "Result"]
    assert str(path.relative_to(ROOT)) in header["Command"]
    assert "TODO" not in " ".join(header.values())
    assert re.search(r"\d", header["Time"])
    assert re.search(r"\d", header["Result"])


def test_there_are_example_configurations():
    assert CONFIGS


LOCKED = ["uv.lock", "requirements.txt", "requirements-dev.txt"]


def test_the_lock_names_no_index_but_the_public_one():
    hosts = {h for name in LOCKED for h in re.findall(r"https?://([^/\"]+)", (ROOT / name).read_text())}
    assert hosts <= {"pypi.org", "files.pythonhosted.org"}
    assert not any("file://" in (ROOT / name).read_text() for name in LOCKED)


def test_the_lock_holds_every_dependency_and_the_requirements_hold_the_lock():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    versions: dict[str, set[str]] = {}
    for package in lock["package"]:
        versions.setdefault(package["name"], set()).add(package.get("version", ""))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]
    assert names <= set(versions)
    for name in LOCKED[1:]:
        pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE))
        assert names <= set(pins), name
        assert all(version in versions[package] for package, version in pins.items()), name
