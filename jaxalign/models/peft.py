"""PEFT's form of a LoRA adapter: its configuration, its tensor names, and what of it is understood here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import NameRule
from jaxalign.models.store import RenamedStore, TensorStore, open_safetensors, read_json

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Our keys in the safetensors metadata; peft and transformers look at `format` alone.
HASH_KEY = "jaxalign.base_hash"

# Settings of PEFT's LoraConfig that make an adapter compute something else when they are set.
_NOT_PLAIN = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# These change the base's weights too, so that the adapter fits no other copy of the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter on a disk: its configuration, and its tensors named after the base's modules."""

    folder: Path
    config: LoraConfig
    store: TensorStore

    def check_against(self, asked: LoraConfig) -> None:
        """Raise `UserError` where an adapter that was asked for has another shape or scale than this one."""
        for key in ("rank", "alpha", "rslora", "targets"):
            mine, wanted = getattr(self.config, key), getattr(asked, key)
            if set(mine) != set(wanted) if key == "targets" else mine != wanted:
                raise UserError(
                    f"the adapter has {key} {mine}, the run asks for {wanted}",
                    place=f"lora.{key}",
                    remedy=f"leave it out to train this adapter on, or merge it first: {self.folder}",
                )


def adapter_rules(rules: list[NameRule], config: LoraConfig) -> list[NameRule]:
    """The names of the adapter's parameters, from the names of the kernels that it adapts."""
    out = []
    for rule in rules:
        if rule.path[-1] == "kernel" and rule.path[-2] in config.targets:
            module = rule.hf.removesuffix(".weight")
            out.append(NameRule((*rule.path[:-1], "adapter", "a"), f"{module}.lora_A.weight", transpose=True))
            out.append(NameRule((*rule.path[:-1], "adapter", "b"), f"{module}.lora_B.weight", transpose=True))
    return out


def open_adapter(folder: Path | None, rules: list[NameRule], base_hash: str) -> PeftAdapter | None:
    """Open a PEFT adapter for the base whose tensor names are `rules`; None without a folder.

    Raises `UserError` for a kind of adapter that is not plain LoRA, and for one trained on another base.
    """
    if folder is None:
        return None
    raw = read_json(folder / CONFIG_FILE)
    _check_plain(raw, folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError("no such file", place=str(file), remedy="save the adapter as safetensors")
    store = open_safetensors([file])
    trained_on = store.metadata.get(HASH_KEY, base_hash)
    if trained_on != base_hash:
        raise UserError(
            f"the adapter was trained on another base (sha256 {trained_on[:12]}, not {base_hash[:12]})",
            place=str(file),
            remedy="name the base that it was trained on in adapter_config.json: base_model_name_or_path",
        )
    renamed = RenamedStore(store, {_plain_name(n): n for n in store.names})
    return PeftAdapter(folder, _config(raw, folder, _targets(renamed, rules)), renamed)


def _plain_name(name: str) -> str:
    """`base_model.model.model.layers.0...lora_A.default.weight` -> `model.layers.0...lora_A.weight`."""
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name).removeprefix(PREFIX)
    return name.replace("model.language_model.", "model.").removeprefix("language_model.")


def _check_plain(raw: Mapping[str, Any], file: Path) -> None:
    odd = [key for key in _NOT_PLAIN if raw.get(key)]
    odd += [key for key, plain in (("peft_type", "LORA"), ("bias", "none")) if raw.get(key, plain) != plain]
    for key in odd:
        raise UserError(
            f"{key} {raw[key]!r} is not supported",
            place=f"{file}: {key}",
            remedy="merge the adapter with peft (merge_and_unload) and load the merged model",
        )
    if str(raw.get("init_lora_weights", "")).lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"an adapter initialised by {raw['init_lora_weights']!r} needs a changed base",
            place=f"{file}: init_lora_weights",
            remedy="save it with peft's path_initial_model_for_weight_conversion, or merge it",
        )


def _targets(store: TensorStore, rules: list[NameRule]) -> tuple[str, ...]:
    """The linear layers that the tensors adapt: `target_modules` may be a pattern, the names are facts."""
    modules = {re.sub(r"\.\d+\.", ".{layer}.", n).rsplit(".lora_", 1)[0] for n in store.names}
    kernels = [r for r in rules if r.path[-1] == "kernel"]
    return tuple(r.path[-2] for r in kernels if r.hf.removesuffix(".weight") in modules)


def _config(raw: Mapping[str, Any], folder: Path, targets: tuple[str, ...]) -> LoraConfig:
    try:
        return LoraConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout") or 0.0,
            targets=targets,  # pyright: ignore[reportArgumentType]  (pydantic checks them)
            rslora=bool(raw.get("use_rslora", False)),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"cannot be understood: {error}",
            place=str(folder / CONFIG_FILE),
            remedy="adapters over attention and feed-forward layers are supported, not over the head",
        ) from error
