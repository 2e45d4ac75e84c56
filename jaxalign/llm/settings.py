"""The keys of whatever answers, the same in every build and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxalign.config import Config
from jaxalign.sharding import MeshConfig


class HttpConfig(Config):
    """An OpenAI-compatible endpoint, `http(s)://host/v1#model`. Its key comes from the environment alone:
    JAXALIGN_API_KEY, or OPENAI_API_KEY for api.openai.com."""

    concurrency: int = Field(default=8, ge=1)
    """requests under way at the same time"""
    requests_per_minute: float = Field(default=0.0, ge=0)
    """no faster than this; 0 is as fast as the endpoint answers"""
    timeout: float = Field(default=120.0, gt=0)
    """seconds after which a request counts as failed"""
    retries: int = Field(default=6, ge=0)
    """how often a request is repeated after what may pass: 429, 5xx, a timeout, a broken connection"""
    max_wait: float = Field(default=120.0, gt=0)
    """longest pause before a repeated request, in seconds, whatever Retry-After says"""
    max_requests: int = Field(default=0, ge=0)
    """a run that would send more stops, and keeps what it has; 0 is off"""
    max_tokens_total: int = Field(default=0, ge=0)
    """a run stops once prompts and answers have this many tokens; 0 is off"""


class LLMConfig(Config):
    """How models answer: local ones on this machine's devices, others over HTTP."""

    batch_size: int = Field(default=64, ge=1)
    """answers of a local model under way at the same time"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of a local model; auto is bf16 where the device multiplies it natively"""
    max_length: int = Field(default=0, ge=0)
    """longest prompt and answer together, in tokens; 0 is the model's own limit"""
    mesh: MeshConfig = MeshConfig()
    """the device mesh of a local model"""
    http: HttpConfig = HttpConfig()
    """an endpoint"""
