"""The log: complete, without duplicates after a kill, readable as JSON whatever the values."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from jaxalign.train.metrics import (
    JsonLines,
    PlainProgress,
    RichProgress,
    TensorBoard,
    Window,
    clock,
    describe,
    make_screen,
    read_lines,
)


def test_window_means_and_sums() -> None:
    window = Window()
    window.add({"loss": 1.0, "num_tokens": 10, "nonfinite": 0})
    window.add({"loss": 3.0, "num_tokens": 30, "nonfinite": 0})
    assert window.steps == 2
    assert window.close() == {"loss": 2.0, "num_tokens": 40, "nonfinite": 0}
    assert window.close() == {}


def test_window_leaves_skipped_steps_out_of_the_means() -> None:
    window = Window()
    window.add({"loss": float("nan"), "num_tokens": 5, "nonfinite": 1})
    window.add({"loss": 4.0, "num_tokens": 5, "nonfinite": 0})
    assert window.close() == {"loss": 4.0, "num_tokens": 10, "nonfinite": 1}


def test_window_survives_json_half_full() -> None:
    window = Window()
    window.add({"loss": 1.0, "num_tokens": 10})
    again = Window(**json.loads(json.dumps(window.state())))
    for w in (window, again):
        w.add({"loss": 2.0, "num_tokens": 1})
    assert again.close() == window.close() == {"loss": 1.5, "num_tokens": 11}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.write(1, {"loss": 0.5, "grad_norm": float("inf")})
    row = json.loads(_lines(tmp_path / "metrics.jsonl")[0])
    log.close()
    assert (row["step"], row["loss"], row["grad_norm"]) == (1, 0.5, None)


def test_resuming_drops_later_lines_and_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    log = JsonLines(path, 3)
    log.write(4, {"loss": 9.0})
    log.close()
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3, 4]
    assert read_lines(path)[-1]["loss"] == 9.0


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    board.write(7, {"loss": 0.25, "eval_loss": 0.5, "bad": float("nan")})
    board.close()
    data = b"".join(p.read_bytes() for p in tmp_path.glob("events.out.tfevents.*"))
    assert b"train/loss" in data
    assert b"eval/loss" in data
    assert b"bad" not in data


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    screen = make_screen(100, stream)
    assert isinstance(screen, PlainProgress)
    screen.advance(9)
    screen.write(10, {"loss": 1.23456, "tokens_per_sec": 1234.5, "eta_sec": 75.0, "mfu": 0.413})
    screen.close()
    assert stream.getvalue() == "step 10/100  loss 1.235  1,234 tokens/s  1:15 left  mfu 41.3 %\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    screen = make_screen(4, stream)
    assert isinstance(screen, RichProgress)
    screen.advance(2)
    screen.write(2, {"loss": 0.5, "eta_sec": 3725})
    screen.close()
    shown = stream.getvalue()
    assert "2/4" in shown
    assert "loss 0.5" in shown
    assert "1:02:05 left" in shown


def test_description_hides_zero_counts_and_missing_values() -> None:
    assert describe({"loss": None, "nonfinite": 0, "epoch": 0.5, "grad_norm": 0.125}) == "grad_norm 0.125"
    assert describe({"nonfinite": 2.0}) == "nonfinite 2"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
