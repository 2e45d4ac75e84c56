"""Models that a build trains on its way, by `train sft`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.config import load_config
from jaxalign.llm.base import LLM
from jaxalign.llm.open import open_llm
from jaxalign.llm.settings import LLMConfig

Rows = Sequence[Mapping[str, Any]]
# (base, rows, folder, keys of `train sft`, how models answer) -> the model that was trained
Trainer = Callable[[str, Rows, Path, Mapping[str, Any], LLMConfig], LLM]

# {rows: (batch_size, max_steps)} of instruction backtranslation (Li et al. 2023, arXiv:2308.06259)
RECIPE = {
    100: (8, 30),
    800: (8, 300),
    1600: (8, 600),
    3200: (32, 500),
    6400: (32, 600),
    12800: (32, 600),
    25600: (32, 1200),
    51200: (32, 1600),
}


def train_sft(base: str, rows: Rows, folder: Path, keys: Mapping[str, Any], answering: LLMConfig) -> LLM:
    """`base` after `train sft` on the rows, in `folder`. Raises `UserError` as that does."""
    from jaxalign.train.run import train

    file = folder.with_name(f"{folder.name}.jsonl")
    folder.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    train("sft", base, str(file), folder, training_keys(len(rows), keys))
    return open_llm(str(folder), answering)


def training_keys(rows: int, keys: Mapping[str, Any]) -> Any:
    """The settings of `train sft`: the paper's batch and steps for about so many rows, and `keys` over them.

    Raises `UserError` for keys that it does not have.
    """
    from jaxalign.train.settings import config_for

    batch, steps = RECIPE[min(RECIPE, key=lambda n: abs(math.log(n / max(1, rows))))]
    return load_config(config_for("sft"), values={"batch_size": batch, "max_steps": steps, **keys})
