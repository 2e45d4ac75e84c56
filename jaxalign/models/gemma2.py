"""Gemma 2 (arXiv:2408.00118): local and global layers in turn, soft caps on attention and output logits."""

from __future__ import annotations

from typing import Any

from jaxalign.models.base import DecoderConfig, Family
from jaxalign.models.common import gemma_fields, gemma_names, read_config


def _from_hf(raw: dict[str, Any]) -> DecoderConfig:
    caps = {
        "attention_softcap": raw.get("attn_logit_softcapping", 50.0),
        "final_softcap": raw.get("final_logit_softcapping", 30.0),
    }
    return read_config(raw, **gemma_fields(raw), **caps)


FAMILY = Family(from_hf=_from_hf, names=gemma_names)
