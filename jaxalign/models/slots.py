"""Several adapters on one base: each in a slot of its own, chosen by name, or added up into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.errors import UserError, nearest
from jaxalign.models.adapters import TARGETS, LoraConfig
from jaxalign.models.decoder import Adapter, Model
from jaxalign.types import Params


@dataclass(frozen=True)
class Slots:
    """Adapters by slot over one base. `model` is the base's; parameters travel as {slot: adapter tree}.

    The slot is chosen while a program is traced: the other slots' arrays are no part of it.
    """

    model: Model
    configs: Mapping[str, Adapter]

    def __getitem__(self, slot: str) -> Model:
        """The model of one slot, whose functions take that slot's tree; `UserError` for an unknown one."""
        if slot not in self.configs:
            known = ", ".join(self.configs)
            raise UserError(
                f"no adapter in slot {slot!r}{nearest(slot, self.configs)}", remedy=f"there are: {known}"
            )
        return replace(self.model, adapter=self.configs[slot])

    def hidden(
        self, slot: str | None, adapters: Mapping[str, Params], base: Params, *rows: Any, **options: Any
    ) -> Any:
        """`Model.hidden` under the adapter of `slot`; None is the base without any."""
        if slot is None:
            return self.model.hidden(None, base, *rows, **options)
        return self[slot].hidden(adapters[slot], base, *rows, **options)


def combine(parts: Sequence[tuple[LoraConfig, Params, float]]) -> tuple[LoraConfig, Params]:
    """One LoRA that does what several (configuration, tree, weight) do together: W + sum of w s A B.

    Their ranks add up. Raises `UserError` for DoRA, whose adapters do not add.
    """
    if any(config.dora for config, _, _ in parts):
        raise UserError("DoRA adapters do not add up", remedy="use one at a time, or merge one into the base")
    rank = sum(config.rank for config, _, _ in parts)
    targets: Any = tuple(t for t in TARGETS if any(t in config.targets for config, _, _ in parts))
    config = LoraConfig(rank=rank, alpha=rank, targets=targets)
    return config, _joined([(c, tree, w) for c, tree, w in parts])


def _joined(parts: Sequence[tuple[LoraConfig, Params | None, float]]) -> Params:
    names = dict.fromkeys(name for _, tree, _ in parts for name in tree or {})
    below = {name: [(c, (tree or {}).get(name), w) for c, tree, w in parts] for name in names}
    return {name: _factors(some) if name == "adapter" else _joined(some) for name, some in below.items()}


def _factors(parts: Sequence[tuple[LoraConfig, Params | None, float]]) -> Params:
    """Columns of every A and rows of every w s B side by side; zeros for a part that has none here."""
    like = next(own for _, own, _ in parts if own)

    def own_or_zero(config: LoraConfig, own: Params | None) -> tuple[jax.Array, jax.Array]:
        if own:
            return own["a"], own["b"]
        *lead, size, _ = like["a"].shape
        return jnp.zeros((*lead, size, config.rank)), jnp.zeros((*lead, config.rank, like["b"].shape[-1]))

    pairs = [(*own_or_zero(config, own), weight * config.scale) for config, own, weight in parts]
    return {
        "a": jnp.concatenate([a for a, _, _ in pairs], axis=-1),
        "b": jnp.concatenate([scale * b for _, b, scale in pairs], axis=-2),
    }
