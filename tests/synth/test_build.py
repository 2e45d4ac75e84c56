"""What a build remembers of the data it was begun with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jaxalign.synth.backtranslation import BacktranslationConfig
from jaxalign.synth.build import digests, inputs


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_one_name_are_all_remembered(tmp_path: Path) -> None:
    files = [tmp_path / folder / "rows.jsonl" for folder in "abc"]
    for i, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f'{{"text": "{i}"}}\n')
    found = digests([files[0], tmp_path / "b", files[2], "org/set"])
    assert found == {
        "rows.jsonl": sha(files[0]),
        "rows.jsonl (2)": sha(files[1]),
        "rows.jsonl (3)": sha(files[2]),
        "org/set": "hub",
    }


def test_data_that_keys_name_counts_too() -> None:
    config = BacktranslationConfig(seed_data="seed.jsonl", dev_data="graded.jsonl")
    assert inputs(None, config) == ["seed.jsonl", "graded.jsonl"]
    assert inputs("docs.jsonl", config.model_copy(update={"dev_data": None})) == ["docs.jsonl", "seed.jsonl"]
    assert inputs(["a", "b"], config)[:2] == ["a", "b"]
