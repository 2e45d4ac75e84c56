"""Gemma 3, text (arXiv:2503.19786): five local layers to a global one, each kind with its own rotary base."""

from __future__ import annotations

from typing import Any

from jaxalign.models.base import DecoderConfig, Family
from jaxalign.models.common import gemma_fields, gemma_names, read_config


def _from_hf(raw: dict[str, Any]) -> DecoderConfig:
    caps = {
        "attention_softcap": raw.get("attn_logit_softcapping"),
        "final_softcap": raw.get("final_logit_softcapping"),
    }
    return read_config(raw, **gemma_fields(raw), **caps, qk_norm=True)


FAMILY = Family(from_hf=_from_hf, names=gemma_names)
