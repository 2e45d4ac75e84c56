"""The logic of benchmarks/: the protocol, the abort rule, the statistics, the common batches, the tables.

What the contenders compute is compared when the benchmarks run; nothing here is timed.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import (
    batches,
    compile,
    contest,
    flops,
    generate,
    prepare,
    protocol,
    sft,
    stats,
    tables,
    weights,
)
from benchmarks.machine import Guard, LoadTooHighError, cpus
from benchmarks.prompts import Prompts
from benchmarks.protocol import Contender, Worker, WorkerError
from benchmarks.rounds import column, interleave, warnings
from benchmarks.session import exit_code

FAKE = """
import os
import time
from benchmarks.measure import serve

def run(job, channel):
    print("a library talks")
    os.system("echo so does a child")
    cpus, threads = sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"]
    channel.reply(ready=job.get("word"), cpus=cpus, threads=threads)
    serve(channel, lambda message: ACTIONS[message["do"]](message))

def double(message):
    return {"value": 2 * message["value"]}

def fail(message):
    raise ArithmeticError("no such number")

def die(message):
    os._exit(7)

def spin(message):
    import threading
    def loop():
        while True:
            pass
    threading.Thread(target=loop, daemon=True).start()
    return {}

def sleep(message):
    time.sleep(1.5)

ACTIONS = {"double": double, "fail": fail, "die": die, "spin": spin, "sleep": sleep}
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fake_contender.py").write_text(textwrap.dedent(FAKE))
    contender = Contender("fake", "fake_contender", sys.executable, options={"word": "yes"})
    with Worker(contender, cpus(1), tmp_path / "logs") as started:
        yield started


def test_worker_answers_and_is_pinned(worker):
    reply = worker.setup({"word": "no", "device": "cpu"})
    assert reply == {"ready": "yes", "cpus": cpus(1), "threads": "1"}  # options win over the job
    answer = worker.ask({"op": "round", "do": "double", "value": 21})
    assert answer["value"] == 42
    assert answer["wall_s"] >= 0
    assert answer["peak_mib"] > 1


def test_failure_brings_the_traceback(worker):
    worker.setup({})
    with pytest.raises(WorkerError, match="no such number"):
        worker.ask({"op": "round", "do": "fail"})


def test_death_brings_the_log(worker):
    worker.setup({})
    with pytest.raises(WorkerError, match=r"ended without an answer(.|\n)*a library talks"):
        worker.ask({"op": "round", "do": "die"})


def test_silence_is_an_error(worker):
    worker.setup({})
    with pytest.raises(WorkerError, match="no answer in 0 s"):
        worker.ask({"op": "round", "do": "sleep"}, timeout=0.2)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_an_idle_worker_uses_no_cpu_even_if_it_spins(worker):
    worker.setup({})
    worker.ask({"op": "round", "do": "spin"})
    pid = worker._process.pid
    before = cpu_ticks(pid)
    time.sleep(0.5)
    assert cpu_ticks(pid) - before <= 1
    assert worker.ask({"op": "round", "do": "double", "value": 1})["value"] == 2


def test_simulated_devices_are_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    with pytest.raises(WorkerError, match="simulates several devices"):
        protocol.environment(1)


def test_guard_stops_a_loaded_machine():
    assert Guard(2, read=lambda: 2.4).check() == {"load": 2.4, "loaded": False}
    with pytest.raises(LoadTooHighError, match=r"2\.50 is over 2\.40"):
        Guard(2, read=lambda: 2.5).check()
    assert Guard(2, allow=True, read=lambda: 2.5).check()["loaded"] is True


def test_guard_waits_for_the_load_to_fall():
    loads, naps = iter([3.0, 1.5, 1.1]), []
    assert Guard(1, read=lambda: next(loads), sleep=naps.append).settle() == 1.1
    assert naps == [5.0, 5.0]
    with pytest.raises(LoadTooHighError, match="stayed over"):
        Guard(1, read=lambda: 9.0, sleep=naps.append, patience=20).settle()
    assert len(naps) == 2 + 4


class FakeWorker:
    """Stands for a `Worker` in tests of the order of rounds."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.contender, self.log = Contender(name, "", ""), log

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.log.append(self.contender.name)
        return {"wall_s": 1.0, "cpu_s": 2.0, "tokens": 10}


def test_rounds_are_interleaved_and_stop_under_load():
    log: list[str] = []
    workers: Any = [FakeWorker("a", log), FakeWorker("b", log)]
    found = interleave(workers, {"steps": 1}, range(3), Guard(1, read=lambda: 0.5), lambda _: None)
    assert log == ["a", "b"] * 3
    assert [r["round"] for r in found] == [0, 0, 1, 1, 2, 2]
    assert column(found, "b", "load") == [0.5] * 3
    loads = iter([0.5, 0.5, 9.0])
    with pytest.raises(LoadTooHighError):
        interleave(workers, {}, range(3), Guard(1, read=lambda: next(loads)), lambda _: None)
    assert len(log) == 6 + 2  # nothing ran once the load was seen


def test_warnings_count_loaded_rounds_and_late_compilations():
    rounds = [{"loaded": True, "compiles": 0}, {"loaded": False, "compiles": 3}, {"loaded": False}]
    lines = warnings(rounds)
    assert "1 of 3 rounds" in lines[0]
    assert lines[1].startswith("3 programs")
    assert warnings([{"loaded": False}]) == []


def test_ratios_pair_rounds():
    # The machine slowed down in round 1 for both: the paired ratio does not notice.
    found = stats.ratios([30.0, 15.0, 33.0], [10.0, 5.0, 10.0])
    assert (found.median, found.low, found.high, found.count) == (3.0, 3.0, 3.3, 3)
    with pytest.raises(ValueError, match="do not pair"):
        stats.ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "precision", "ok"),
    [(2.0001, "f32", True), (2.001, "f32", False), (2.03, "bf16", True), (2.1, "bf16", False),
     (float("nan"), "bf16", False)],
)  # fmt: skip
def test_first_losses_must_agree(loss, precision, ok):
    losses = {"ours": 2.0, "peer": loss}
    if ok:
        assert stats.check_losses(losses, "ours", precision)["peer"] == pytest.approx(loss / 2 - 1)
    else:
        with pytest.raises(stats.DifferentWorkError, match="peer"):
            stats.check_losses(losses, "ours", precision)


def test_agreement_counts_rows_and_prefixes():
    found = stats.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]])
    assert found == {"rows": 0.5, "tokens": 5 / 8}
    with pytest.raises(stats.DifferentWorkError):
        stats.agreement([[1, 2]], [[1]])


def test_generation_check_is_strict_on_the_first_rows():
    answers = {"jaxalign": [[1, 2], [3, 4]], "peer": [[1, 2], [3, 0]]}
    assert generate.check(answers, 1)["peer"] == {"rows": 0.5, "tokens": 0.75}
    with pytest.raises(stats.DifferentWorkError, match="first 2 prompts"):
        generate.check(answers, 2)


def test_best_row_of_each_rival():
    rivals = {"ours": "", "a1": "a", "a2": "a", "b": "b"}
    assert stats.best({"ours": 9.0, "a1": 1.0, "a2": 2.0, "b": 0.5}, rivals) == {"a": "a2", "b": "b"}


def test_table_and_file(tmp_path):
    rows = [{"name": "a", "speed": stats.spread([1000.0, 1234.0, 1500.0])}, {"name": "b", "speed": None}]
    text = tables.markdown(["name", "speed", "absent"], rows)
    lines = text.splitlines()
    assert "1,234 (1,000-1,500)" in lines[2]
    assert lines[3].split() == ["|", "b", "|", "-", "|", "-", "|"]
    assert len({len(line) for line in lines}) == 1
    record = {"machine": {"processor": "x", "accelerator": ""}, "versions": {"a": {"jax": "1"}}, "rows": rows}
    tables.write(tmp_path / "r.json", "Title", text, record, ["a note"])
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["rows"][0]["speed"] == {"median": 1234.0, "low": 1000.0, "high": 1500.0, "count": 3}
    page = (tmp_path / "r.md").read_text()
    assert "- processor: x" in page
    assert "accelerator" not in page
    with pytest.raises(TypeError, match="Path"):
        tables.write(tmp_path / "s.json", "", "", {"machine": {}, "path": Path()})


def examples(rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    sizes = rng.integers(2, 40, count)
    return [(rng.integers(1, 99, n).astype(np.int32), np.arange(n) >= n // 2) for n in sizes]


def test_packing_fits_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(1, 33, 200).tolist()
    bins = batches.pack(lengths, 32)
    assert sorted(i for b in bins for i in b) == list(range(200))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 32
    assert len(bins) <= 1.1 * sum(lengths) / 32 + 1


def test_every_contender_gets_the_same_examples(tmp_path):
    given = examples(np.random.default_rng(1), 60)
    batches.save(tmp_path / "m.npz", batches.mixed(given, steps=3, rows=2, length=64, seed=0))
    steps = batches.load(tmp_path / "m.npz")
    known = {t.tobytes() for t, _ in given}
    for index in range(3):
        pairs = steps.examples(index)
        assert {t.tobytes() for t, _ in pairs} <= known
        assert steps.trained(index) == sum(len(t) for t, _ in pairs)
        _, labels, attention = steps.padded(index)
        assert attention.sum() == steps.trained(index)
        # A packed row and padded rows train the same targets: the first token of an example never is one.
        assert (labels[:, 1:] != batches.IGNORED).sum() == steps.mask[index].sum()
        assert (labels[attention == 0] == batches.IGNORED).all()
        for segment, position in zip(
            steps.segments[index].ravel(), steps.positions[index].ravel(), strict=True
        ):
            assert segment or not position
    assert steps.trained(0) == steps.trained(3)  # steps start over


def test_fixed_rows_train_every_token_but_the_first():
    steps = batches.fixed(np.arange(100), steps=2, rows=3, length=16)
    assert steps.trained(1) == 48
    assert steps.mask.sum(-1).tolist() == [[15] * 3] * 2
    assert steps.context() == 16
    assert steps.examples(1)[0][0].tolist() == list(range(48, 64))
    with pytest.raises(ValueError, match="100 tokens, 160"):
        batches.fixed(np.arange(100), steps=2, rows=5, length=16)


def test_prompts_pad_on_the_left(tmp_path):
    rows = np.array([[1, 2, 0], [3, 4, 5]])
    np.savez(tmp_path / "p.npz", tokens=rows, lengths=np.array([2, 3]), ends=np.array([7, 8]))
    prompts = Prompts.load(tmp_path / "p.npz")
    tokens, mask = prompts.left_padded(2, pad=9)
    assert tokens.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert prompts.left_padded(1, pad=9)[0].shape == (1, 2)
    assert prompts.left_padded(2, pad=9, start=1)[0].tolist() == [[3, 4, 5]]
    with pytest.raises(ValueError, match="3 prompts"):
        prompts.first(3)


def test_flops_of_known_shapes():
    small = flops.Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True)
    assert small.matmul == 134_479_872
    assert small.lora_train(256) == 4 * 134_479_872 + 3 * 2 * 256 * 30 * 576
    eight = flops.shape(flops.SHAPES["8b"])
    assert eight.stored == pytest.approx(8.03e9, rel=1e-3)
    assert flops.shape(flops.SHAPES["1b"]).stored == pytest.approx(1.236e9, rel=1e-3)
    # The specification's figure: 131 kB of keys and values a token at 8B in bfloat16.
    assert eight.decode_bytes(1, 1, 2) - eight.decode_bytes(1, 0, 2) == 131_072
    assert flops.datasheet("NVIDIA H200, 143771 MiB")["flops"] == 989e12
    assert flops.datasheet("") == {}


def test_random_weights_and_adapter_are_readable(tmp_path):
    weights.random_model(tmp_path / "m", "tiny")
    weights.adapter(tmp_path / "a", tmp_path / "m", rank=4, alpha=8.0)
    shape = flops.read(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "np") as file:
        names = list(file.keys())
        assert {n: tuple(file.get_slice(n).get_shape()) for n in names} == weights.tensors(shape)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        a = file.get_tensor("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")
        b = file.get_tensor("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight")
    assert a.shape == (4, 128)
    assert 0.9 / np.sqrt(128) < np.abs(a).max() <= 1 / np.sqrt(128)
    assert b.shape == (64, 4)
    assert not b.any()


def test_conversations_end_with_the_answer():
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert prepare.conversation(row) == asked
    assert prepare.conversation({"messages": asked}) == asked


def sft_result() -> dict[str, Any]:
    losses = {"jaxalign": [2.0, 1.5, 1.0], "TRL": [2.0, 1.5, 1.01]}
    starts = {n: {"ready_s": 3.0, "compile_s": None} for n in losses}
    learned = {
        n: {"first": {"losses": v[:1], "wall_s": 4.0}, "warmup": {"losses": v[1:2]}}
        for n, v in losses.items()
    }
    speed = {"jaxalign": 1.0, "TRL": 4.0}
    rounds = [
        {"contender": n, "wall_s": speed[n], "cpu_s": 2 * speed[n], "tokens": 100, "losses": losses[n][2:],
         "peak_mib": 10.0, "load": 0.1, "loaded": False}
        for n in losses
    ]  # fmt: skip
    return {"starts": starts, "learned": learned, "rounds": rounds, "gaps": {"jaxalign": 0.0, "TRL": 0.0},
            "cold_compile_s": {"jaxalign": 9.0}}  # fmt: skip


def test_sft_rows_and_headline():
    who = [Contender("jaxalign", "", ""), Contender("TRL", "", "", "TRL")]
    ours, trl = contest.rows(sft_result(), who, {"data": "fixed"}, {"MFU%": 0.5})
    assert ours["tok/s"].median == 100.0
    assert ours["MFU%"] == 50.0
    assert ours["cold-compile-s"] == 9.0
    assert trl["tok/s"].median == 25.0
    assert trl["ours/this"].median == 4.0
    assert trl["CPU-ours/this"].median == 4.0
    assert trl["gap-curve"] == pytest.approx(0.01)
    (line,) = contest.headline(sft_result(), who, [ours, trl])
    assert line.startswith("ours over TRL: 4 (4-4)")


class Pace:
    """A worker whose warm-up takes `seconds`."""

    def __init__(self, contender: Contender, log: list[str]) -> None:
        self.contender, self.log = contender, log

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.log.append(self.contender.name)
        seconds = self.contender.options["seconds"]
        return {"wall_s": seconds, "cpu_s": seconds, "losses": [2.0], "tokens": 100}

    def quit(self) -> None:
        self.log.append(f"quit {self.contender.name}")


def test_the_fastest_row_of_a_rival_goes_into_the_rounds(monkeypatch, tmp_path):
    log: list[str] = []
    rows = [("jaxalign", "", 1.0), ("a1", "a", 3.0), ("a2", "a", 2.0), ("b", "b", 9.0)]
    who = [Contender(name, "", "", rival, {"seconds": s}) for name, rival, s in rows]
    monkeypatch.setattr(contest, "start", lambda contender, *_: (Pace(contender, log), {"ready_s": 1.0}))
    options = SimpleNamespace(warmup=1, steps=1, rounds=2, all_rows=False)
    session: Any = SimpleNamespace(options=options, work=tmp_path, say=lambda _: None)
    held = contest.Contest(session, {"precision": "f32"}, Guard(1, read=lambda: 0.0))
    held.together(who)
    assert [r["contender"] for r in held.rounds] == ["jaxalign", "a2", "b"] * 2
    assert [x for x in log if x.startswith("quit")] == ["quit a1"]
    (line,) = contest.dropped({"rounds": held.rounds, "learned": held.learned})
    assert line.startswith("a1: 33 tok/s")


def test_sft_contenders_cover_every_rival():
    class Options:
        python, peer_python, compile_peer = "a", "b", False

    rivals = {c.rival for c in sft.contenders(Options, "mixed", "bf16")}
    assert rivals == {"", "bare loop", "TRL", "TRL default", "TRL packed"}
    tuned = [c for c in sft.contenders(Options, "fixed", "bf16") if c.rival == "TRL"]
    assert len(tuned) == 3
    assert not any(c.options.get("checkpointing") for c in tuned)


def test_compile_faults_are_found():
    rows = [
        {"task": "epoch, packed", "later-compiles": 0},
        {"task": "epoch, length buckets", "later-compiles": 2},
        {"task": "training step", "layers": 4, "aliased-bytes": "10", "state-bytes": "10"},
        {"task": "training step", "layers": 8, "aliased-bytes": "0", "state-bytes": "20"},
    ]
    late, kept = compile.faults(rows)
    assert late == "epoch, length buckets: 2 compiled after warm-up"
    assert kept == "8 layers: 0 of 20 bytes of the state are aliased"


def test_exit_codes_tell_why(capsys):
    def loaded() -> None:
        raise LoadTooHighError("busy")

    def different() -> None:
        raise stats.DifferentWorkError("not the same")

    assert exit_code(lambda: None) == 0
    assert exit_code(loaded) == 3
    assert exit_code(different) == 4
    assert "not the same" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


def test_more_threads_than_processors_are_refused():
    count = len(os.sched_getaffinity(0))
    assert len(cpus(count)) == count
    with pytest.raises(ValueError, match="threads asked for"):
        cpus(count + 1)
