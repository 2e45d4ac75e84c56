"""Rotary position embeddings, with the frequency scalings of transformers' `rope_parameters`.

RoFormer (arXiv:2104.09864, eq. 34). Angles are computed in float32 from explicit positions, so padding on
either side and packed rows need no special case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.errors import UserError


@dataclass(frozen=True)
class Rope:
    """One set of rotary frequencies. `scaling` holds the keys of transformers' `rope_parameters`, sorted."""

    kind: str
    theta: float
    dim: int
    max_positions: int
    scaling: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(cls, parameters: dict[str, Any], dim: int, max_positions: int) -> Rope:
        """From one entry of `rope_parameters`. Raises `UserError` for a kind this file does not know."""
        kind = parameters.get("rope_type", "default")
        if kind not in _FREQUENCIES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"rope_type {kind!r} (partial_rotary_factor {parameters.get('partial_rotary_factor', 1.0)}) "
                "is not supported",
                place="config.json: rope_parameters",
                remedy=f"known: {', '.join(_FREQUENCIES)}, each over the whole head",
            )
        rest = {k: v for k, v in parameters.items() if k not in ("rope_type", "rope_theta", "type")}
        return cls(kind, float(parameters["rope_theta"]), dim, max_positions, tuple(sorted(rest.items())))

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin, float32 [N, T, dim], of int32 positions [N, T]."""
        inverse, factor = _FREQUENCIES[self.kind](self, positions)
        half = positions[..., None].astype(jnp.float32) * inverse
        full = jnp.concatenate([half, half], axis=-1)
        return jnp.cos(full) * factor, jnp.sin(full) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads x [N, T, heads, dim] by the angles [N, T, dim]."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def _powers(rope: Rope, theta: Any) -> jax.Array:
    return theta ** (jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim)


def _default(rope: Rope, positions: jax.Array) -> tuple[jax.Array, float]:
    return 1.0 / _powers(rope, rope.theta), 1.0


def _linear(rope: Rope, positions: jax.Array) -> tuple[jax.Array, float]:
    return 1.0 / _powers(rope, rope.theta) / dict(rope.scaling)["factor"], 1.0


def _dynamic(rope: Rope, positions: jax.Array) -> tuple[jax.Array, float]:
    """NTK-aware scaling: theta grows with the longest position of each row; rows do not affect each other."""
    factor = dict(rope.scaling)["factor"]
    length = jnp.maximum(positions.max(axis=-1, keepdims=True) + 1, rope.max_positions).astype(jnp.float32)
    stretch = factor * length / rope.max_positions - (factor - 1)
    theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return 1.0 / _powers(rope, theta[..., None]), 1.0


def _llama3(rope: Rope, positions: jax.Array) -> tuple[jax.Array, float]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    s = dict(rope.scaling)
    inverse = 1.0 / _powers(rope, rope.theta)
    low, high, context = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / s["factor"] + smooth * inverse
    scaled = jnp.where(wavelength > context / low, inverse / s["factor"], inverse)
    medium = (wavelength <= context / low) & (wavelength >= context / high)
    return jnp.where(medium, between, scaled), 1.0


def _yarn(rope: Rope, positions: jax.Array) -> tuple[jax.Array, float]:
    """YaRN (arXiv:2309.00071, section 3.2): a ramp from extrapolated to interpolated frequencies."""
    s = dict(rope.scaling)
    context = s.get("original_max_position_embeddings") or rope.max_positions
    factor = s.get("factor") or rope.max_positions / context

    def correction(rotations: float) -> float:
        return rope.dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(s.get("beta_fast") or 32), correction(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = jnp.clip((jnp.arange(rope.dim // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    extrapolated = 1.0 / _powers(rope, rope.theta)
    return extrapolated / factor * ramp + extrapolated * (1 - ramp), _yarn_attention_factor(s, factor)


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1.0)


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
