"""The keys of `jaxalign generate` and `jaxalign chat`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxalign.config import Config
from jaxalign.sharding import MeshConfig
from jaxalign.types import SamplingParams


class GenerateConfig(Config):
    """How answers are sampled."""

    temperature: float = Field(default=1.0, ge=0)
    """spread of the draws; 0 always takes the likeliest token"""
    top_k: int = Field(default=0, ge=0)
    """draw from the k likeliest tokens; 0 is off"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; 1 is off"""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """drop tokens less likely than this share of the likeliest; 0 is off"""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """above 1, makes tokens of prompt and answer less likely to come again"""
    max_tokens: int = Field(default=256, ge=1)
    """longest answer, in tokens"""
    n: int = Field(default=1, ge=1)
    """answers to every prompt"""
    stop: tuple[str, ...] = ()
    """strings that end an answer and are cut from it"""
    seed: int = Field(default=0, ge=0)
    """answers are a function of seed and row id, whatever else is in the file"""
    batch_size: int = Field(default=64, ge=1)
    """answers under way at the same time"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of weights and products; auto is bf16 where the device multiplies it natively"""
    mesh: MeshConfig = MeshConfig()
    """the device mesh"""

    def params(self, seed: int = 0) -> SamplingParams:
        """One request's parameters; `seed` tells requests apart."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_tokens,
            stop=self.stop,
            n=self.n,
            seed=(self.seed + seed) % 2**32,
        )
