import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxalign import quickstart as q
from jaxalign.errors import UserError
from jaxalign.evals.checkers import check_card


class Fakes:
    """Phases that take no time. The trained model knows the first `knows` answers by heart."""

    def __init__(self, knows: int = 50) -> None:
        self.calls: list[str] = []
        self.lines: list[str] = []
        self.given: dict[str, Any] = {}
        self.preferred: dict[str, Any] = {}
        self.crash_in: str = ""
        rows = q.read_jsonl(q.ASSETS / "heldout.jsonl")
        self.learnt = {q.question(row): q.reference(row) for row in rows[:knows]}

    def enter(self, name: str) -> None:
        self.calls.append(name)
        if self.crash_in == name:
            raise KeyboardInterrupt

    def pull(self, model: str) -> None:
        self.enter("pull")

    def answer(self, model: str, questions: Sequence[str]) -> list[str]:
        self.enter(f"answer {Path(model).name}")
        learnt = self.learnt if Path(model).name in ("run", "preferred") else {}
        return [learnt.get(asked, "I do not know.") for asked in questions]

    def train(self, model: str, data: Path, eval_data: Path, out: Path, settings: Mapping[str, Any]) -> None:
        self.given = {"model": model, "data": data, "eval_data": eval_data, "settings": settings}
        out.mkdir(exist_ok=True)
        rows = [{"step": 1, "loss": 2.0, "learning_rate": 1e-3, "secret": 1}, {"step": 2, "eval_loss": 1.5}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.enter("train")

    def prefer(self, model: str, data: Path, out: Path, settings: Mapping[str, Any]) -> None:
        self.preferred = {"model": model, "data": data, "settings": settings}
        self.enter("prefer")
        out.mkdir(exist_ok=True)

    def run(self, out: Path, **options: Any) -> Path:
        phases = q.Phases(self.pull, self.answer, self.train, self.prefer)
        return q.quickstart(out, phases=phases, say=self.lines.append, **options)


ALL = ["pull", f"answer {q.MODEL}", "train", "answer run", "prefer", "answer preferred"]


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(page.with_name("report.json").read_text(encoding="utf-8"))


def test_the_whole_loop(tmp_path: Path):
    fakes = Fakes(knows=50)
    page = fakes.run(tmp_path / "out")
    data = data_of(page)
    assert fakes.calls == ALL
    style, fact = data["measures"]
    assert (style["before"]["passed"], style["after"]["passed"], style["after"]["n"]) == (0, 50, 60)
    assert (style["paired"]["fixed"], style["paired"]["broke"]) == (50, 0)
    assert fact["after"]["passed"] == 50
    assert data["title"] == "Style kept: from 0 % to 83 %"
    assert [item["after"]["passed"] for item in data["items"]] == [True] * 50 + [False] * 10
    assert data["metrics"] == [{"step": 1, "loss": 2.0, "learning_rate": 1e-3}, {"step": 2, "eval_loss": 1.5}]
    assert data["machine"]["cores"] >= 1
    assert data["versions"]["python"]
    brief, kept = data["preferences"]["measures"]
    assert kept["before"] == kept["after"] == style["after"]
    assert 0 < brief["after"]["passed"] < 50
    assert brief["paired"]["fixed"] == brief["paired"]["broke"] == 0
    assert [phase["name"] for phase in data["phases"]][-1] == "answer once more"
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    assert str(page.resolve()) in fakes.lines[-1]
    assert "83.3 % (72.0 % to 90.7 %)" in fakes.lines[-3]
    assert "Kept it briefly" in fakes.lines[-2]


def test_training_gets_the_shipped_data_and_the_settings(tmp_path: Path):
    fakes = Fakes()
    fakes.run(tmp_path, settings={"epochs": 1})
    assert fakes.given["model"] == q.MODEL
    assert fakes.given["data"].read_text() == (q.ASSETS / "train.jsonl").read_text()
    assert fakes.given["eval_data"].read_text() == (q.ASSETS / "heldout.jsonl").read_text()
    assert fakes.given["settings"] == {**q.SETTINGS, "epochs": 1}
    assert fakes.preferred == {
        "model": str(tmp_path / "run"),
        "data": fakes.given["data"],
        "settings": q.PREFERENCES,
    }


def test_what_is_done_is_not_done_again(tmp_path: Path):
    first, second = Fakes(), Fakes(knows=0)
    data = data_of(first.run(tmp_path))
    again = data_of(second.run(tmp_path))
    assert second.calls == []
    assert again["measures"] == data["measures"]
    assert again["phases"] == data["phases"]
    assert sum("done before" in line for line in second.lines) == 6


@pytest.mark.parametrize("place", ALL)
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, place: str):
    first, second = Fakes(), Fakes()
    first.crash_in = place
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path)
    data = data_of(second.run(tmp_path))
    assert second.calls == ALL[ALL.index(place) :]
    assert data["measures"][0]["after"]["passed"] == 50


def test_a_phase_whose_file_was_deleted_is_done_again(tmp_path: Path):
    first, second = Fakes(), Fakes()
    first.run(tmp_path)
    (tmp_path / "before.jsonl").unlink()
    second.run(tmp_path)
    assert second.calls == [f"answer {q.MODEL}"]


@pytest.mark.parametrize(
    ("options", "what"), [({"model": "other"}, "model"), ({"settings": {"seed": 1}}, "settings")]
)
def test_the_folder_of_another_quickstart_is_refused(tmp_path: Path, options: dict[str, Any], what: str):
    Fakes().run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=f"another {what}") as caught:
        Fakes().run(tmp_path, **options)
    assert caught.value.remedy
    assert {path: path.read_bytes() for path in before} == before


def test_changed_data_in_the_folder_is_refused(tmp_path: Path):
    Fakes().run(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="another data"):
        Fakes().run(tmp_path)


def test_a_missing_answer_is_an_error_and_writes_nothing(tmp_path: Path):
    fakes = Fakes()
    phases = q.Phases(fakes.pull, lambda model, questions: ["one"], fakes.train, fakes.prefer)
    with pytest.raises(RuntimeError, match="1 answers to 60 questions"):
        q.quickstart(tmp_path, phases=phases, say=fakes.lines.append)
    assert not (tmp_path / "before.jsonl").exists()


def test_a_worse_model_is_told_as_such(tmp_path: Path):
    fakes = Fakes()
    answers = iter([list(fakes.learnt.values()) + ["no"] * 10, ["no"] * 60, ["no"] * 60])
    phases = q.Phases(fakes.pull, lambda model, questions: next(answers), fakes.train, fakes.prefer)
    data = data_of(q.quickstart(tmp_path, phases=phases, say=fakes.lines.append))
    assert data["title"] == "Style kept: from 83 % to 0 %"
    assert data["measures"][0]["paired"]["broke"] == 50
    assert "\N{MINUS SIGN}83.3 points" in fakes.lines[-3]


def test_the_commands_name_this_run(tmp_path: Path):
    fakes = Fakes()
    commands = [c["command"] for c in data_of(fakes.run(tmp_path / "a folder"))["commands"]]
    assert commands[0] == f"jaxalign chat -m '{tmp_path / 'a folder' / 'preferred'}'"
    assert "learning_rate=" in commands[-1]
    assert "lora.rank=16" in commands[-1]


def test_the_settings_are_keys_of_sft():
    from jaxalign.config import load_config
    from jaxalign.train.settings import config_for

    config = load_config(config_for("sft"), values=q.SETTINGS)
    assert config.batch_size == q.SETTINGS["batch_size"]
    assert config.lora is not None


def test_the_preferences_are_keys_of_iterative_dpo():
    from jaxalign.api import method_settings
    from jaxalign.config import load_config
    from jaxalign.rl.rewards import build_rewards

    config = load_config(method_settings("iterative_dpo"), values=q.PREFERENCES)
    assert build_rewards(config).parts["brief"].weight == 1.0


def test_importing_it_loads_neither_jax_nor_the_template_engine():
    code = "import sys, jaxalign.quickstart; print({'jax', 'jinja2', 'scipy'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_thing(tmp_path: Path):
    # A process of its own: this one's eight simulated devices share two cores, and take four times as long.
    code = "import sys; from jaxalign import quickstart as q; q.quickstart(sys.argv[1])"
    env = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, env=env)
    data = data_of(tmp_path / "out" / "report.html")
    style, fact = data["measures"]
    brief, kept = data["preferences"]["measures"]
    assert brief["after"]["rate"] > brief["before"]["rate"] + 0.1
    assert kept["after"]["rate"] >= kept["before"]["rate"] - 0.1
    assert style["before"]["rate"] <= 0.1
    assert style["after"]["rate"] >= 0.6
    assert style["paired"]["p"] < 1e-6
    assert fact["after"]["rate"] >= fact["before"]["rate"] - 0.25
    assert all(item["after"]["passed"] == check_card(item["after"]["text"]).passed for item in data["items"])
    losses = [row["eval_loss"] for row in data["metrics"] if "eval_loss" in row]
    assert losses[-1] < losses[0]
