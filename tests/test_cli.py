"""The command line: what reaches the API, what a mistake looks like, and how a run ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jaxalign import api, cli
from jaxalign.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


@pytest.fixture
def started(monkeypatch) -> list[api.Run]:
    """The runs that `train` would have started."""
    runs: list[api.Run] = []
    monkeypatch.setattr(api, "start", runs.append)
    return runs


@pytest.fixture
def tiny(tmp_path) -> str:
    """A model folder with nothing but its configuration: enough to plan with."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


def test_train_hands_over_files_overrides_and_options(started, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: from-file\nepochs: 2\nlora: {rank: 4}\n")
    result = run(
        "train", "sft", "-c", str(file), "-d", "rows.jsonl", "-o", "out", "lora.alpha=8", "z_loss=1e-4"
    )
    assert result.exit_code == 0, result.output
    (found,) = started
    assert (found.method, found.model, found.data, found.out) == (
        "sft",
        "from-file",
        "rows.jsonl",
        Path("out"),
    )
    c = found.config
    assert (c.epochs, c.lora.rank, c.lora.alpha, c.z_loss) == (2.0, 4, 8.0, 1e-4)
    assert "lora" in c.model_fields_set
    assert "mesh" not in c.model_fields_set


def test_a_yaml_file_alone_names_the_method_and_everything_else(started, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: sft\nmodel: m\ndata: [a.jsonl, b.jsonl]\nout: o\n")
    assert run("train", str(file), "seed=3").exit_code == 0
    assert started[0].data == ("a.jsonl", "b.jsonl")
    assert started[0].config.seed == 3


def test_python_takes_the_same_keys(started):
    import jaxalign

    jaxalign.train("sft", model="m", data=["a", "b"], out="o", lora={"rank": 2}, label_smoothing=0.1)
    jaxalign.train("sft", model="m", data="a", out="o", lora=None, **{"mesh.fsdp": 2})
    assert started[0].config.lora.rank == 2
    assert started[0].config.label_smoothing == 0.1
    assert started[1].config.lora is None
    assert started[1].config.mesh.fsdp == 2


def test_every_mistake_is_told_at_once_without_a_traceback(started, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rat: 1\nlora:\n  rnak: 8\n")
    result = run("train", "sft", "-c", str(file), "-m", "m", "epochs=many")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert f"{file}:1: learning_rat: unknown key; did you mean 'learning_rate'?" in result.output
    assert f"{file}:3: lora.rnak: unknown key; did you mean 'lora.rank'?" in result.output
    assert "override 'epochs=many': epochs: input should be a valid number" in result.output
    assert "data: is needed: rows to learn: files, folders or hub data sets (-d)" in result.output
    assert "out: is needed: folder of the run (-o)" in result.output
    assert started == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train", "stf", "-m", "m"), "unknown training method 'stf'; did you mean 'sft'?"),
        (("train", "-m", "m"), "no training method"),
        (("train", "sft", "--learning_rate", "1"), "keys are written without dashes: learning_rate=VALUE"),
        (("train", "sft", "extra"), "'extra' is neither key=value nor a .yaml file"),
        (("generate", "-m", "m"), "-d DATA and -o OUT are needed"),
        (("generate", "sft"), "'sft' is neither key=value nor a .yaml file"),
        (("chat",), "-m MODEL is needed"),
        (("inspect", "modle", "-m", "m"), "inspect takes data or model, not 'modle'; did you mean 'model'?"),
        (("inspect", "data", "-m", "m"), "-d DATA is needed"),
        (("export", "-m", "m", "-o", "o", "--format", "pfet"), "unknown format 'pfet'; did you mean 'peft'?"),
        (("plan", "sft", "-m", "m", "--on", "h10:8"), "unknown machine 'h10:8'; did you mean 'h100'?"),
    ],
)
def test_a_wrong_word_is_answered_with_what_to_do(args, said):
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_wrong_verb_is_answered_with_the_nearest():
    result = run("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.output


def _fails_with(monkeypatch, error: BaseException) -> Result:
    def fail(run: Any) -> None:
        raise error

    monkeypatch.setattr(api, "start", fail)
    return run("train", "sft", "-m", "m", "-d", "d", "-o", "o")


def test_a_user_error_keeps_its_status_and_place(monkeypatch):
    error = UserError("stopped", place="out", remedy="run it again", status=75)
    result = _fails_with(monkeypatch, error)
    assert result.exit_code == 75
    assert result.stderr == "error: out: stopped\n  run it again\n"
    assert result.stdout == ""


def test_an_unexpected_error_shows_its_traceback_and_asks_for_a_report(monkeypatch):
    result = _fails_with(monkeypatch, ZeroDivisionError("surprise"))
    assert result.exit_code == 1
    assert "ZeroDivisionError: surprise" in result.stderr
    assert "Traceback" in result.stderr
    assert "jaxalign doctor" in result.stderr


def test_a_device_without_memory_is_told_what_to_lower(monkeypatch):
    result = _fails_with(monkeypatch, RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"))
    assert result.exit_code == 1
    assert "lower batch_size and raise grad_accumulation" in result.stderr
    assert "fault in jaxalign" not in result.stderr


def test_ctrl_c_ends_without_a_traceback(monkeypatch):
    result = _fails_with(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert "the same command goes on" in result.stderr


def test_help_of_a_method_lists_its_keys_with_type_default_and_help():
    text = " ".join(run("train", "sft", "--help").output.split())
    assert "lora.rank int, default 16 columns of A and rows of B" in text
    assert "label_smoothing float, default 0.0 share of the target" in text
    assert "mesh.fsdp int, default -1" in text
    assert (
        "lora.targets list of q | k | v | o | gate | up | down, default [q, k, v, o, gate, up, down]" in text
    )


def test_help_without_a_method_names_the_methods():
    assert "METHOD is one of: sft" in run("train", "--help").output


def test_every_verb_has_help():
    listed = run("--help").output
    for command in cli.app.registered_commands:
        name = command.name or ""
        assert name in listed
        page = run(name, "--help")
        assert page.exit_code == 0, page.output
        assert "Usage" in page.output


def test_plan_reads_a_configuration_and_no_weights(tiny):
    result = run("plan", "sft", "-m", tiny, "--on", "h100:2", "--json", "batch_size=4", "max_length=128")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["step"]["tokens"] == 512
    assert found["parameters"]["base"] == 256 * 32 * 2 + 32 + 2 * (
        2 * 32 + 3 * 32 * 64 + 32 * 32 * 2 + 32 * 16 * 2
    )
    assert found["problems"] == []


def test_a_plan_that_cannot_work_fails(tiny):
    result = run("plan", "sft", "-m", tiny, "--on", "h100:2", "batch_size=3", "max_length=4096")
    assert result.exit_code == 1
    assert "batch_size 3 does not divide" in result.output
    assert "max_length 4096 is over the model's 512 positions" in result.output


def test_dry_run_shows_the_plan_and_starts_nothing(started, tiny, monkeypatch):
    from jaxalign import preflight

    monkeypatch.setattr(preflight, "_with_data", lambda job, *rest: job)
    result = run("train", "sft", "-m", tiny, "-d", "rows.jsonl", "-o", "never", "--dry-run", "max_length=256")
    assert result.exit_code == 0, result.output
    assert "memory of a device" in result.output
    assert started == []
    assert not Path("never").exists()


def test_the_installed_command_answers_in_a_process_of_its_own():
    code = "import sys; sys.argv[0] = 'jaxalign'; from jaxalign.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "stf"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2
    assert "did you mean 'sft'?" in done.stderr
    assert done.stdout == ""
