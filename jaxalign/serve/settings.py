"""The keys of `jaxalign serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxalign.config import Config
from jaxalign.sharding import MeshConfig


class ServeConfig(Config):
    """Where a model is served, and on what."""

    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 is every one this machine has"""
    port: int = Field(default=8000, ge=0, le=65535)
    """port to listen at; 0 takes a free one"""
    api_key_env: str = ""
    """environment variable with the key that clients must send; empty asks for none"""
    name: str = ""
    """what requests call the model; empty is the name it was started with"""
    batch_size: int = Field(default=64, ge=1)
    """answers under way at the same time; further ones wait"""
    steps: int = Field(default=8, ge=1)
    """tokens sampled before text is sent on and new requests are let in"""
    max_length: int = Field(default=0, ge=0)
    """longest prompt and answer together, in tokens; 0 is the model's own limit"""
    grace: int = Field(default=30, ge=0)
    """seconds that answers under way are given when the server is told to stop"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of weights and products; auto is bf16 where the device multiplies it natively"""
    mesh: MeshConfig = MeshConfig()
    """the device mesh"""
