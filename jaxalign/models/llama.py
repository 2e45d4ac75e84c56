"""Llama 2 and 3 (arXiv:2302.13971, arXiv:2407.21783), SmolLM2 and everything else of that shape."""

from __future__ import annotations

from jaxalign.models.base import Family
from jaxalign.models.common import read_config, read_names

FAMILY = Family(from_hf=read_config, names=read_names)
