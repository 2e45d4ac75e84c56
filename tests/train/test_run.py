"""Whole runs of a tiny model: killed, stopped, moved to another mesh, refused, finished; what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jaxalign.config import load_config
from jaxalign.errors import UserError
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import make_mesh
from jaxalign.train import folder
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.metrics import read_lines
from jaxalign.train.programs import COMPILATIONS
from jaxalign.train.run import RunResult, train
from jaxalign.train.settings import config_for
from tests.train.tiny import write_model, write_rows

# 16 rows are left to train on: an epoch is 2 steps, checkpoints fall on its end and inside it.
KEYS = [
    "max_steps=8",
    "batch_size=8",
    "learning_rate=1e-3",
    "log_every=3",
    "checkpoint_every=3",
    "eval_fraction=0.2",
    "eval_every=4",
    "dtype=f32",
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and rows, and a compilation cache that every process of these tests shares."""
    root = tmp_path_factory.mktemp("runs")
    write_model(root / "model")
    write_rows(root / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        yield root


def run(here: Path, out: Path, *keys: str, model: str = "model", rows: str = "rows.jsonl") -> RunResult:
    """`train` in this process, with `KEYS` and `keys`."""
    config = load_config(config_for("sft"), overrides=[*KEYS, *keys])
    return train("sft", str(here / model), here / rows, out, config)


@pytest.fixture(scope="module")
def whole(here: Path) -> RunResult:
    """The run that nothing interrupts."""
    return run(here, here / "whole")


def adapter(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    """The results of two runs, bit for bit, and their logs but for the clock."""
    one, two = adapter(a), adapter(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
    assert log(a) == log(b)


def log(out: Path) -> list[dict[str, Any]]:
    clock = ("time", "tokens_per_sec", "tokens_per_sec_per_device", "step_time_sec", "eta_sec")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_lines(out / "metrics.jsonl")]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process a real SIGTERM while the batch of `step` is made."""
    from jaxalign.data.batching import BatchSource

    sound = BatchSource.batch

    def batch(self: BatchSource, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the handler runs in the main thread
        return sound(self, number)

    monkeypatch.setattr(BatchSource, "batch", batch)


def stop_at(here: Path, out: Path, step: int, *keys: str) -> UserError:
    """A run that a SIGTERM at about `step` ends."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, step)
        with pytest.raises(UserError, match="stopped by a signal") as caught:
            run(here, out, *keys)
    return caught.value


# ---------------------------------------------------------------------------------- what a run leaves


def test_the_folder_holds_everything(here: Path, whole: RunResult) -> None:
    names = {p.name for p in whole.folder.iterdir()} - {".lock"}
    expected = {
        "config.yaml",
        "versions.json",
        "data_report.json",
        "metrics.jsonl",
        "run.json",
        "result.json",
    }
    assert names == expected | {"tb", "checkpoints", "adapter"}
    config = yaml.safe_load((whole.folder / "config.yaml").read_text())
    assert (config["method"], config["batch_size"], config["dtype"]) == ("sft", 8, "f32")
    assert config["lora"]["rank"] == 16
    versions = json.loads((whole.folder / "versions.json").read_text())
    assert (versions["jax"], versions["seed"], versions["devices"]) == (jax.__version__, 0, 8)
    report = json.loads((whole.folder / "data_report.json").read_text())
    assert (report["tokens"]["rows"], report["batches"]["examples"], report["batches"]["held_out"]) == (
        20,
        16,
        4,
    )
    files = {p.name for p in (whole.folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files


def test_it_learns_and_logs(whole: RunResult) -> None:
    rows = [r for r in read_lines(whole.folder / "metrics.jsonl") if "loss" in r]
    tests = [r for r in read_lines(whole.folder / "metrics.jsonl") if "eval_loss" in r]
    assert [r["step"] for r in rows] == [1, 3, 6, 8]
    assert [r["step"] for r in tests] == [4, 8]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert tests[1]["eval_loss"] < tests[0]["eval_loss"]
    assert rows[-1]["epoch"] == 4.0
    assert whole.metrics["eval_loss"] == tests[1]["eval_loss"]
    assert "mfu" not in rows[-1]  # the peak of this processor is not known


def test_an_epoch_of_mixed_lengths_compiles_nothing_late(whole: RunResult) -> None:
    """Two row lengths in training, at least one in evaluation, all compiled before the first step."""
    assert whole.compiled["programs"] >= 3
    assert whole.compiled["late"] == 0
    assert COMPILATIONS.count > 0


def test_the_checkpoint_holds_the_adapter_and_not_the_base(whole: RunResult) -> None:
    folder = whole.folder / "checkpoints"
    assert Checkpoints(folder, {}).steps() == [6, 8]
    for part in ("params", "opt"):
        names = (folder / "8" / part / "_METADATA").read_text()
        assert "adapter.a" in names
        assert "kernel" not in names
        assert "embedding" not in names


def test_the_result_is_a_model_again(here: Path, whole: RunResult) -> None:
    loaded = load_model(resolve(str(whole.folder)), make_mesh())
    got = loaded.adapter["layers"]["attn"]["q"]["adapter"]["a"]
    stored = adapter(whole.folder)["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(np.asarray(got)[1], stored.T)


def test_full_tuning_leaves_a_whole_model(here: Path) -> None:
    out = here / "full"
    result = run(here, out, "lora=null", "max_steps=3", "eval_fraction=0")
    before, after = (
        load_model(resolve(str(p)), make_mesh()).base["layers"]["mlp"]["up"]["kernel"]
        for p in (here / "model", out)
    )
    assert result.result == out / "model"
    assert 1e-5 < float(jnp.abs(after - before).max()) < 0.05
    again = run(here, out, "lora=null", "max_steps=4", "eval_fraction=0")
    assert (again.resumed_from, again.step) == (3, 4)


# ------------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("step", [2, 5])
def test_sigterm_saves_and_resumes_bit_for_bit(
    here: Path, whole: RunResult, tmp_path: Path, step: int
) -> None:
    error = stop_at(here, tmp_path / "out", step)
    assert error.status == 75
    assert "run the same command again" in str(error)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result = run(here, tmp_path / "out")
    assert 0 < result.resumed_from < 8
    assert_same(whole.folder, tmp_path / "out")


def child(here: Path, out: Path, end: str, *keys: str, wait: bool = True) -> subprocess.Popen[bytes]:
    """The same run in a process of its own."""
    words = [sys.executable, "-m", "tests.train.child", end, str(out), str(here / "model")]
    process = subprocess.Popen(
        [*words, str(here / "rows.jsonl"), *KEYS, *keys], cwd=ROOT, stderr=subprocess.PIPE
    )
    if wait:
        process.communicate(timeout=300)
    return process


def test_killed_between_checkpoints_and_resumed_bit_for_bit(
    here: Path, whole: RunResult, tmp_path: Path
) -> None:
    """SIGKILL inside a log window, step 7 of 8: the checkpoint of step 3 is on disk by then, perhaps 6."""
    out = tmp_path / "out"
    assert child(here, out, "step:7").returncode == -signal.SIGKILL
    assert not (out / "result.json").exists()
    result = run(here, out)
    assert result.resumed_from in (3, 6)
    assert_same(whole.folder, out)


@pytest.mark.slow
def test_killed_again_and_again(here: Path, whole: RunResult, tmp_path: Path) -> None:
    """Before any checkpoint; while one is being written; on the epoch's end; then a SIGTERM from outside."""
    out = tmp_path / "out"
    assert child(here, out, "step:2").returncode == -signal.SIGKILL
    assert child(here, out, "save:3").returncode == -signal.SIGKILL
    assert child(here, out, "step:4").returncode == -signal.SIGKILL
    process = child(here, out, "never", "checkpoint_every=1", wait=False)
    lines = iter(process.stderr.readline, b"")  # type: ignore[union-attr]
    assert any(line.startswith(b"step ") for line in lines)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode in (75, 0), error  # 0: it was faster than the signal
    run(here, out)
    assert_same(whole.folder, out)


def two(here: Path, out: Path, *keys: str) -> list[subprocess.Popen[bytes]]:
    """The same run on two processes with four devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    words = [sys.executable, "-m", "tests.train.child", "never", str(out), str(here / "model")]
    words += [str(here / "rows.jsonl"), *KEYS, *keys]
    return [
        subprocess.Popen(words, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE)
        for i in range(2)
    ]


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_by_one(here: Path, whole: RunResult, tmp_path: Path) -> None:
    """SIGTERM to the second of two processes: both save the same step, and one process with as many devices
    goes on to the result of a run that was always alone."""
    out = tmp_path / "out"
    processes = two(here, out)
    for line in iter(processes[0].stderr.readline, b""):  # type: ignore[union-attr]
        if line.startswith(b"step "):
            break
    processes[1].send_signal(signal.SIGTERM)
    errors = [p.communicate(timeout=300)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [75, 75], errors
    result = run(here, out)
    assert 0 < result.resumed_from < 8
    expected = adapter(whole.folder)
    for name, value in adapter(out).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    assert [r["step"] for r in log(out)] == [r["step"] for r in log(whole.folder)]


@pytest.mark.parametrize(
    "mesh",
    [
        ["mesh.fsdp=2", "mesh.tensor=4"],
        pytest.param(["mesh.data=8", "mesh.fsdp=1"], marks=pytest.mark.slow),
    ],
)
def test_resumes_on_another_mesh(here: Path, whole: RunResult, tmp_path: Path, mesh: list[str]) -> None:
    stop_at(here, tmp_path / "out", 3)
    result = run(here, tmp_path / "out", *mesh)
    assert 0 < result.resumed_from < 8
    expected = adapter(whole.folder)
    for name, value in adapter(tmp_path / "out").items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


def test_a_finished_run_does_nothing(here: Path, whole: RunResult, capfd: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*") if p.is_file() and p.name != ".lock"}
    again = run(here, whole.folder)
    assert "finished (8 steps)" in capfd.readouterr().err
    assert (again.step, again.resumed_from, again.result) == (8, 8, whole.result)
    assert again.metrics == whole.metrics
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_cannot_be_made_shorter(here: Path, whole: RunResult) -> None:
    with pytest.raises(UserError, match="planned for 8 steps, now there are 5"):
        run(here, whole.folder, "max_steps=5")


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(here: Path, whole: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole.folder, out)
    result = run(here, out, "max_steps=10")
    assert (result.resumed_from, result.step) == (8, 10)
    assert [r["step"] for r in read_lines(out / "metrics.jsonl") if "loss" in r][-2:] == [9, 10]
    assert not np.array_equal(*(next(iter(adapter(o).values())) for o in (out, whole.folder)))


# ------------------------------------------------------------------------------------------ refusals


def test_another_configuration_is_refused_by_name(here: Path, whole: RunResult) -> None:
    with pytest.raises(UserError, match=r"learning_rate: 0.001 -> 0.1\n.*lora.rank: 16 -> 4"):
        run(here, whole.folder, "learning_rate=0.1", "lora.rank=4", "log_every=1")


def test_resume_never_refuses_a_used_folder(here: Path, whole: RunResult) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        run(here, whole.folder, "resume=never")


def test_another_base_is_refused(here: Path, whole: RunResult, tmp_path: Path) -> None:
    write_model(here / "other", seed=1)
    with pytest.raises(UserError, match="base_hash: "):
        run(here, whole.folder, model="other")
    assert Checkpoints(whole.folder / "checkpoints", {}).steps() == [6, 8]


def test_other_data_is_refused(here: Path, whole: RunResult) -> None:
    write_rows(here / "more.jsonl", 21)
    with pytest.raises(UserError, match=r"data.examples: 16 -> 17"):
        run(here, whole.folder, rows="more.jsonl")


def test_a_batch_that_does_not_divide(here: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size=12 does not divide") as caught:
        run(here, tmp_path / "out", "batch_size=12")
    assert "try batch_size=16" in str(caught.value)


def test_two_processes_cannot_share_a_folder(here: Path, tmp_path: Path) -> None:
    with folder.locked(tmp_path), pytest.raises(UserError, match="another process is training"):
        run(here, tmp_path)


def poisoned(here: Path, name: str, row: slice) -> str:
    """A copy of the model whose embedding holds NaN in some rows."""
    if not (here / name).exists():
        shutil.copytree(here / "model", here / name)
        file = here / name / "model.safetensors"
        tensors = load_file(file)
        tensors["model.embed_tokens.weight"][row] = np.nan
        save_file(tensors, file, metadata={"format": "pt"})
    return name


def test_a_nan_loss_stops_with_step_and_rows(here: Path, tmp_path: Path) -> None:
    model = poisoned(here, "nan", slice(None))
    with pytest.raises(UserError, match=r"2 steps in a row, the last of them step 2 with the rows r\d+"):
        run(here, tmp_path / "out", "max_nonfinite=2", model=model)
    rows = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert [(r["step"], r["nonfinite"]) for r in rows] == [(1, 1)]
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_full_disk_stops_with_a_clear_error(here: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "out").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match="disk is full"):
            run(here, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
