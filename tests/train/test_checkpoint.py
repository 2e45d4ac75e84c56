"""Checkpoints: exact, atomic, refused for another run, and readable on another mesh."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.train.checkpoint import Checkpoints
from tests.train.toy import Toy, parts

IDENTITY = {"base_hash": "aaa", "data": {"rows": 12, "content": "xyz"}}


def _open(folder: Path, identity: dict[str, Any] | None = None, **keys: Any) -> Checkpoints:
    return Checkpoints(folder, identity or IDENTITY, **keys)


def _steps(toy: Toy, first: int, last: int) -> None:
    for step in range(first, last):
        toy.state, _ = toy.programs(toy.state, toy.make(step)[0])


def _same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def toy() -> Toy:
    made = Toy()
    _steps(made, 0, 3)
    return made


def test_nothing_to_restore(tmp_path: Path, toy: Toy) -> None:
    assert _open(tmp_path / "c").restore(toy.like()) is None


def test_restores_bit_for_bit_with_progress(tmp_path: Path, toy: Toy) -> None:
    _open(saver := tmp_path / "c").steps()
    checkpoints = _open(saver)
    checkpoints.save(3, parts(toy.state), {"tokens": 7})
    checkpoints.wait()
    found = _open(saver).restore(toy.like())
    assert found is not None
    assert (found.step, found.progress) == (3, {"tokens": 7})
    assert _same(found.parts, dict(parts(toy.state)))
    assert found.parts["params"]["w"].sharding == toy.state["params"]["w"].sharding


def test_the_saved_arrays_may_be_donated_at_once(tmp_path: Path, toy: Toy) -> None:
    before = jax.tree.map(np.array, dict(parts(toy.state)))
    checkpoints = _open(tmp_path)
    checkpoints.save(3, parts(toy.state), {})
    _steps(toy, 3, 9)  # every step donates the state
    checkpoints.wait()
    found = checkpoints.restore(toy.like())
    assert found is not None
    assert _same(found.parts, before)
    assert not _same(dict(parts(toy.state)), before)


@pytest.mark.parametrize("shape", [{"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_restores_onto_another_mesh(tmp_path: Path, toy: Toy, shape: dict[str, int]) -> None:
    checkpoints = _open(tmp_path)
    checkpoints.save(3, parts(toy.state), {})
    checkpoints.wait()
    other = Toy(mesh=shape)
    found = checkpoints.restore(other.like())
    assert found is not None
    assert _same(found.parts, dict(parts(toy.state)))
    assert found.parts["params"]["w"].sharding == other.state["params"]["w"].sharding


def test_keeps_the_newest(tmp_path: Path, toy: Toy) -> None:
    checkpoints = _open(tmp_path, keep=2)
    for step in (3, 6, 9, 12):
        checkpoints.save(step, parts(toy.state), {})
    checkpoints.wait()
    assert checkpoints.steps() == [9, 12]
    assert {p.name for p in tmp_path.iterdir()} == {"9", "12"}


def test_never_the_frozen_base(tmp_path: Path, toy: Toy) -> None:
    """What is on disk is the size of what trains."""
    checkpoints = _open(tmp_path)
    checkpoints.save(3, parts(toy.state), {})
    checkpoints.wait()
    assert {p.name for p in (tmp_path / "3").iterdir() if p.is_dir()} == {"params", "opt", "rest"}


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({**IDENTITY, "base_hash": "bbb"}, "base_hash: aaa -> bbb"),
        ({**IDENTITY, "data": {"rows": 13, "content": "xyz"}}, "data.rows: 12 -> 13"),
    ],
)
def test_another_base_or_data_set_is_refused(
    tmp_path: Path, toy: Toy, identity: dict[str, Any], named: str
) -> None:
    checkpoints = _open(tmp_path)
    checkpoints.save(3, parts(toy.state), {})
    checkpoints.wait()
    with pytest.raises(UserError, match=named):
        _open(tmp_path, identity).restore(toy.like())
    assert checkpoints.steps() == [3]


def _save_and_wait(checkpoints: Checkpoints, step: int, toy: Toy) -> None:
    checkpoints.save(step, parts(toy.state), {})
    checkpoints.wait()


def _tear(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_torn_checkpoint_falls_back_and_can_be_written_again(tmp_path: Path, toy: Toy) -> None:
    messages: list[str] = []
    checkpoints = _open(tmp_path, say=messages.append)
    checkpoints.save(2, parts(toy.state), {})
    checkpoints.save(3, parts(toy.state), {})
    checkpoints.wait()
    _tear(tmp_path / "3")
    found = checkpoints.restore(toy.like())
    assert found is not None
    assert found.step == 2
    assert "checkpoint 3 cannot be read" in messages[0]
    checkpoints.save(3, parts(toy.state), {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]


def test_an_unfinished_one_is_cleared_away(tmp_path: Path, toy: Toy) -> None:
    (tmp_path / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    checkpoints = _open(tmp_path)
    assert checkpoints.restore(toy.like()) is None
    assert list(tmp_path.iterdir()) == []


def test_all_torn_is_an_error_that_keeps_them(tmp_path: Path, toy: Toy) -> None:
    checkpoints = _open(tmp_path, say=lambda text: None)
    checkpoints.save(3, parts(toy.state), {})
    checkpoints.wait()
    _tear(tmp_path / "3")
    with pytest.raises(UserError, match="none of the 1"):
        checkpoints.restore(toy.like())
    assert (tmp_path / "3").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_full_disk_is_a_clear_error_and_the_last_one_stays(tmp_path: Path, toy: Toy) -> None:
    """The file size limit stands in for a full disk: the write itself fails, deep inside orbax."""
    checkpoints = _open(tmp_path)
    checkpoints.save(3, parts(toy.state), {"tokens": 1})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(UserError, match="step 4 could not be written") as caught:
            _save_and_wait(checkpoints, 4, toy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint 3 is whole" in str(caught.value)
    found = _open(tmp_path).restore(toy.like())
    assert found is not None
    assert found.step == 3
    assert {p.name for p in tmp_path.iterdir()} == {"3"}
