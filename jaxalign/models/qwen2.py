"""Qwen2 and Qwen2.5 (arXiv:2407.10671): biases on q, k and v; a window from `max_window_layers` on."""

from __future__ import annotations

from typing import Any

from jaxalign.models.base import DecoderConfig, Family
from jaxalign.models.common import read_config, read_names


def _from_hf(raw: dict[str, Any]) -> DecoderConfig:
    return read_config(raw, qkv_bias=True, out_bias=False)


FAMILY = Family(from_hf=_from_hf, names=read_names)
