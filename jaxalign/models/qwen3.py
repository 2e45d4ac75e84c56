"""Qwen3 (arXiv:2505.09388): queries and keys are normalised per head."""

from __future__ import annotations

from typing import Any

from jaxalign.models.base import DecoderConfig, Family
from jaxalign.models.common import read_config, read_names


def _from_hf(raw: dict[str, Any]) -> DecoderConfig:
    return read_config(raw, qk_norm=True)


FAMILY = Family(from_hf=_from_hf, names=read_names)
