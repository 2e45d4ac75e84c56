"""Mistral (arXiv:2310.06825): Llama's layers, every one with a sliding window where the config has one."""

from __future__ import annotations

from jaxalign.models.base import Family
from jaxalign.models.common import read_config, read_names

FAMILY = Family(from_hf=read_config, names=read_names)
