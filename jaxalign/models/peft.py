"""PEFT's form of an adapter: its configuration, its tensor names, and what of it is understood here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import DecoderConfig, NameRule
from jaxalign.models.prefix import PrefixConfig, PromptConfig, pack_prefix, unpack_prefix
from jaxalign.models.store import RenamedStore, TensorStore, open_safetensors, read_json
from jaxalign.types import Params

PREFIX = "base_model.model."
_EMBEDDINGS = "prompt_embeddings"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Our keys in the safetensors metadata; peft and transformers look at `format` alone.
HASH_KEY = "jaxalign.base_hash"

# The head of a reward model, in transformers' name for it: one row of a sequence classifier.
SCORE = "score"

# Settings of PEFT's LoraConfig that make an adapter compute something else when they are set.
_NOT_PLAIN = (
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
    config: LoraConfig | PrefixConfig | PromptConfig
    store: TensorStore

    def check_against(self, asked: Any) -> None:
        """Raise `UserError` where an adapter that was asked for has another shape or scale than this one."""
        if asked.peft_type != self.config.peft_type:
            raise UserError(
                f"the adapter is of kind {self.config.peft_type}, the run asks for {asked.peft_type}",
                place=str(self.folder / CONFIG_FILE),
                remedy=f"leave {asked.key} out to train this adapter on, or {self._otherwise}",
            )
        for key in FORMS[asked.peft_type].fixed:
            mine, wanted = getattr(self.config, key), getattr(asked, key)
            if set(mine) != set(wanted) if key == "targets" else mine != wanted:
                raise UserError(
                    f"the adapter has {key} {mine}, the run asks for {wanted}",
                    place=f"{asked.key}.{key}",
                    remedy=f"leave it out to train this adapter on, or {self._otherwise}",
                )

    @property
    def _otherwise(self) -> str:
        return f"merge it first: {self.folder}" if self.config.foldable else "start from its base"


def adapter_rules(rules: list[NameRule], config: LoraConfig) -> list[NameRule]:
    """The names of the adapter's parameters, from the names of the kernels that it adapts."""
    out = []
    for rule in rules:
        if rule.path[-1] == "kernel" and rule.path[-2] in config.targets:
            module = rule.hf.removesuffix(".weight")
            out.append(NameRule((*rule.path[:-1], "adapter", "a"), f"{module}.lora_A.weight", transpose=True))
            out.append(NameRule((*rule.path[:-1], "adapter", "b"), f"{module}.lora_B.weight", transpose=True))
            if config.dora:
                out.append(NameRule((*rule.path[:-1], "adapter", "m"), f"{module}.lora_magnitude_vector"))
    return out


def open_adapter(
    folder: Path | None, rules: list[NameRule], base_hash: str | None = None
) -> PeftAdapter | None:
    """Open a PEFT adapter for the base whose tensor names are `rules`; None without a folder.

    Raises `UserError` for a kind of adapter that is not known here and, where `base_hash` is given, for one
    trained on another base.
    """
    if folder is None:
        return None
    raw = read_json(folder / CONFIG_FILE)
    form = _form(raw, folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError("no such file", place=str(file), remedy="save the adapter as safetensors")
    store = open_safetensors([file])
    trained_on = store.metadata.get(HASH_KEY)
    if trained_on and base_hash and trained_on != base_hash:
        raise UserError(
            f"the adapter was trained on another base (sha256 {trained_on[:12]}, not {base_hash[:12]})",
            place=str(file),
            remedy="name the base that it was trained on in adapter_config.json: base_model_name_or_path",
        )
    renamed = RenamedStore(store, {_plain_name(n): n for n in store.names})
    return PeftAdapter(folder, _config(raw, folder, form, _targets(renamed, rules)), renamed)


def _plain_name(name: str) -> str:
    """`base_model.model.model.layers.0...lora_A.default.weight` -> `model.layers.0...lora_A.weight`."""
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name).removeprefix(PREFIX)
    name = name.removeprefix("base_model.")  # the head beside virtual tokens
    name = re.sub(r"\.lora_magnitude_vector\..*weight$", ".lora_magnitude_vector", name)
    return name.replace("model.language_model.", "model.").removeprefix("language_model.")


def _form(raw: Mapping[str, Any], file: Path) -> Form:
    odd = [key for key in _NOT_PLAIN if raw.get(key) and (key, raw[key]) != ("modules_to_save", [SCORE])]
    odd += [] if raw.get("peft_type", "LORA") in FORMS else ["peft_type"]
    plain = {"bias": "none", "num_transformer_submodules": 1}
    odd += [key for key, value in plain.items() if (raw.get(key) or value) != value]
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
    return FORMS[raw.get("peft_type", "LORA")]


def _targets(store: TensorStore, rules: list[NameRule]) -> tuple[str, ...]:
    """The linear layers that the tensors adapt: `target_modules` may be a pattern, the names are facts."""
    modules = {re.sub(r"\.\d+\.", ".{layer}.", n).rsplit(".lora_", 1)[0] for n in store.names}
    kernels = [r for r in rules if r.path[-1] == "kernel"]
    return tuple(r.path[-2] for r in kernels if r.hf.removesuffix(".weight") in modules)


def _config(raw: Mapping[str, Any], folder: Path, form: Form, targets: tuple[str, ...]) -> Any:
    try:
        return form.read(raw, targets)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"cannot be understood: {error}",
            place=str(folder / CONFIG_FILE),
            remedy="adapters over attention and feed-forward layers are supported, not over the head",
        ) from error


def _read_lora(raw: Mapping[str, Any], targets: tuple[Any, ...]) -> LoraConfig:
    return LoraConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout") or 0.0,
        targets=targets,
        rslora=bool(raw.get("use_rslora", False)),
        dora=bool(raw.get("use_dora", False)),
    )


def _write_lora(config: LoraConfig, decoder: DecoderConfig, names: list[NameRule]) -> dict[str, Any]:
    kernels = [r for r in names if r.path[-1] == "kernel" and r.path[-2] in config.targets]
    return {
        "r": config.rank,
        # vLLM wants an integer.
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({r.hf.rsplit(".", 2)[-2] for r in kernels}),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _write_virtual(config: Any, heads: int, width: int, decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config.length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": decoder.num_layers,
    }


def _write_prefix(config: PrefixConfig, decoder: DecoderConfig, names: list[NameRule]) -> dict[str, Any]:
    width = decoder.num_kv_heads * decoder.head_dim
    own = {"encoder_hidden_size": width, "prefix_projection": False}
    return _write_virtual(config, decoder.num_kv_heads, width, decoder) | own


def _write_prompt(config: PromptConfig, decoder: DecoderConfig, names: list[NameRule]) -> dict[str, Any]:
    own = {"prompt_tuning_init": "RANDOM"}
    return _write_virtual(config, decoder.num_heads, decoder.hidden_size, decoder) | own


def _virtual_rules(rules: list[NameRule], config: Any) -> list[NameRule]:
    return [NameRule((_EMBEDDINGS,), _EMBEDDINGS)]


def _as_it_is(tree: Params, config: DecoderConfig) -> Params:
    return tree


@dataclass(frozen=True)
class Form:
    """How PEFT writes one kind of adapter.

    fixed         the keys of our configuration in which two adapters must agree to be one
    read, write   PEFT's settings (and the layers that have tensors) -> our configuration, and back
    rules         names of the tensors, without `prefix`, from those of the base
    head          prefix of the name of a reward model's head
    classifier    PEFT's settings of an adapter with such a head
    pack, unpack  our tree -> the tree that `rules` names, and back
    """

    fixed: tuple[str, ...]
    read: Callable[[Mapping[str, Any], tuple[str, ...]], Any]
    write: Callable[[Any, DecoderConfig, list[NameRule]], dict[str, Any]]
    rules: Callable[[list[NameRule], Any], list[NameRule]] = _virtual_rules
    prefix: str = ""
    head: str = "base_model."
    classifier: dict[str, Any] = field(default_factory=lambda: {"task_type": "SEQ_CLS"})
    pack: Callable[[Params, DecoderConfig], Params] = _as_it_is
    unpack: Callable[[Params, DecoderConfig], Params] = _as_it_is


FORMS = {
    "LORA": Form(
        ("rank", "alpha", "rslora", "dora", "targets"),
        _read_lora,
        _write_lora,
        adapter_rules,
        PREFIX,
        head=PREFIX,
        classifier={"task_type": "SEQ_CLS", "modules_to_save": [SCORE]},
    ),
    "PREFIX_TUNING": Form(
        ("length",),
        lambda raw, _: PrefixConfig(length=raw["num_virtual_tokens"]),
        _write_prefix,
        pack=lambda tree, config: {_EMBEDDINGS: pack_prefix(tree, config)},
        unpack=lambda tree, config: unpack_prefix(tree[_EMBEDDINGS], config),
    ),
    "PROMPT_TUNING": Form(
        ("length",),
        lambda raw, _: PromptConfig(length=raw["num_virtual_tokens"]),
        _write_prompt,
        pack=lambda tree, _: {_EMBEDDINGS: tree["prompt"]["adapter"]},
        unpack=lambda tree, _: {"prompt": {"adapter": tree[_EMBEDDINGS]}},
    ),
}
