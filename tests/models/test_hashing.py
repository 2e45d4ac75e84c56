"""The hash of a model's files."""

from __future__ import annotations

import os

import pytest

from jaxalign.models.hashing import content_hash


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


def test_the_hash_is_of_all_bytes_and_is_remembered(tmp_path, monkeypatch):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(os.urandom(1000))
    first = content_hash(files)
    assert len(first) == 64
    assert content_hash(files[::-1]) != first
    (tmp_path / "c").write_bytes(files[0].read_bytes())
    assert content_hash([tmp_path / "c", files[1]]) == first
    raw = bytearray(files[1].read_bytes())
    raw[500] ^= 1
    files[1].write_bytes(raw)
    assert content_hash(files) != first
    # A remembered file is not read again.
    changed = content_hash(files)
    status = files[1].stat()
    files[1].write_bytes(os.urandom(1000))
    os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_hash(files) == changed
    monkeypatch.setenv("JAXALIGN_CACHE", "/proc/no/such/folder")
    assert content_hash(files) != changed
