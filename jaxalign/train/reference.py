"""The reference policy of losses that compare with one: where its weights are, and how they move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from jaxalign.config import Config
from jaxalign.errors import UserError
from jaxalign.types import Params

Mode = Literal["frozen", "adapter_off", "precomputed", "ema"]
Move = Callable[[Params, Params, Any], Params]


class ReferenceConfig(Config):
    """What the policy is compared with: itself as it was at the start, unless it moves."""

    mode: Literal["auto"] | Mode = "auto"
    """frozen: a copy of the weights that train; adapter_off: the base without its adapter, which needs no
    copy; precomputed: log-probs of all rows, computed before the first step and kept in `cache`; ema: a copy
    that follows the policy (TR-DPO); auto takes adapter_off for a new adapter, else frozen, and in stages a
    copy that each stage renews"""
    cache: Path | None = None
    """file of precomputed log-probs, written if it is not there; null takes reference.npz in the output
    folder"""
    sync_every: int = Field(default=512, ge=1)
    """updates between two moves of an ema reference"""
    mix: float = Field(default=0.6, gt=0, le=1)
    """share of the policy in a move, reference <- mix policy + (1 - mix) reference; 1 copies it"""


REFERENCE = ReferenceConfig()


def resolve_mode(
    config: ReferenceConfig, *, full: bool, imported: bool, renewed: bool = False, mixes: bool = False
) -> Mode:
    """The mode of a run. `full`: every weight trains; `imported`: the adapter had been trained before;
    `renewed`: each stage has its own reference, and so there is a copy that moves; `mixes`: the adapter is of
    a kind that can be averaged.

    Raises `UserError` where the configured mode does not go with what trains, or with stages.
    """
    if renewed:
        return _renewed(config)
    if config.mode == "auto":
        return "frozen" if full or imported else "adapter_off"
    if config.mode == "adapter_off" and full:
        raise UserError(
            "there is no adapter to switch off: every weight is trained",
            place="reference.mode",
            remedy="set reference.mode=frozen, or train an adapter (lora)",
        )
    if config.mode == "ema" and not (full or mixes) and config.mix < 1:
        # The mean of two products A B is not the product of the means.
        raise UserError(
            f"adapters cannot be mixed (reference.mix={config.mix:g}): their two factors are not linear",
            place="reference.mix",
            remedy="set reference.mix=1, which copies the adapter, or lora=null",
        )
    return config.mode


def _renewed(config: ReferenceConfig) -> Mode:
    if config.mode != "auto":
        raise UserError(
            "each stage is compared with the policy that the stage before it ended with, which "
            f"{config.mode} does not know",
            place="reference.mode",
            remedy="leave it out, or set stages.new_reference=false",
        )
    return "ema"


def held(mode: Mode | None) -> bool:
    """Whether the training state holds weights of the reference beside its own."""
    return mode in ("frozen", "ema")


def mover(config: ReferenceConfig, mode: Mode, begins: Sequence[int] | None = None) -> Move | None:
    """move(reference, params, step): the reference of the next update, when `step` updates were made; None
    where it stays (arXiv:2404.09656, eqs. 5 and 6).

    It moves every `sync_every` updates; `begins`: after those numbers of updates instead, and then to the
    policy itself (sDPO, arXiv:2403.19270).
    """
    if mode != "ema":
        return None

    def move(reference: Params, params: Params, step: Any) -> Params:
        due = (step > 0) & (step % config.sync_every == 0) if begins is None else _among(step, begins)
        share = jnp.where(due, config.mix if begins is None else 1.0, 0.0)
        # Not `old + share (new - old)`: a share of 1 must give the policy bit for bit.
        return jax.tree.map(lambda old, new: share * new + (1 - share) * old, reference, params)

    return move


def _among(step: Any, begins: Sequence[int]) -> Any:
    return (step == jnp.asarray(begins, jnp.int32)).any()
