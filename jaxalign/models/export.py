"""Weights out: a PEFT adapter, or a whole model in the form that transformers loads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.errors import UserError
from jaxalign.models.base import NameRule
from jaxalign.models.decoder import Model
from jaxalign.models.load import HEAD, open_checkpoint
from jaxalign.models.peft import CONFIG_FILE, FORMS, HASH_KEY, SCORE, WEIGHTS_FILE
from jaxalign.models.pull import BUILTINS
from jaxalign.models.store import read_json, safetensors_files
from jaxalign.models.write import tensors, verify, write_files
from jaxalign.registry import FAMILIES
from jaxalign.types import ModelSource, Params

# What a tokenizer may be made of, in any transformers release.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
# Beside these, files that an export may replace.
_OURS = ("config.json", "generation_config.json", CONFIG_FILE, "model.safetensors.index.json", "README.md")


class SavesTokenizer(Protocol):
    """A tokenizer that can write itself into a folder."""

    def save_pretrained(self, folder: str, /) -> Any:
        """Write the tokenizer's files."""
        ...


def export_peft(
    model: Model,
    adapter: Params,
    source: ModelSource,
    out_dir: Path | str,
    *,
    stop_tokens: Sequence[int] = (),
    base_hash: str = "",
    tokenizer: SavesTokenizer | None = None,
    head: Params | None = None,
) -> Path:
    """Write the adapter so that peft, transformers and vLLM load it; returns the folder.

    With a `head` {"kernel": [1, D]} it is the adapter of a reward model, in transformers' words a classifier
    of sequences with one label.

    The folder appears whole or not at all, and replaces an earlier export. `base_hash` goes into the file's
    metadata: a load on another base is refused. Raises `UserError` for a full disk, for a folder that holds
    other things, and when what was written does not read back bit for bit.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter to export")
    names = FAMILIES[model.config.model_type].names(model.config)
    form = FORMS[model.adapter.peft_type]
    rules = [replace(r, hf=form.prefix + r.hf) for r in form.rules(names, model.adapter)]
    scorer = replace(HEAD, hf=form.head + HEAD.hf)
    items = tensors(*_with_head(rules, form.pack(adapter, model.config), head, scorer), np.float32)
    metadata = {"format": "pt"} | ({HASH_KEY: base_hash} if base_hash else {})
    with _new_folder(Path(out_dir)) as folder:
        write_files(items, folder, Path(WEIGHTS_FILE).stem, 1 << 62, metadata)
        verify(items, [folder / WEIGHTS_FILE], folder / WEIGHTS_FILE)
        _write_json(folder / CONFIG_FILE, _adapter_config(model, source) | (form.classifier if head else {}))
        if stop_tokens:
            _write_json(folder / "generation_config.json", {"eos_token_id": _ids(stop_tokens)})
        if tokenizer:
            tokenizer.save_pretrained(str(folder))
    return Path(out_dir)


def export_hf(
    model: Model,
    base: Params,
    source: ModelSource,
    out_dir: Path | str,
    *,
    stop_tokens: Sequence[int] = (),
    tokenizer: SavesTokenizer | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    head: Params | None = None,
) -> Path:
    """Write `base` (trained in full, or with an adapter merged in) as a folder that transformers loads.

    The tokenizer is the source's own, copied file by file, unless `tokenizer` is given; a GGUF source has
    no such files and needs it. `dtype` casts the weights, None keeps them. Otherwise as `export_peft`,
    `head` included.
    """
    if source.gguf and tokenizer is None:
        raise ValueError("a GGUF file has no tokenizer files to copy: pass tokenizer=")
    out = Path(out_dir)
    if out.resolve() == source.folder.resolve():
        remedy = "choose another folder"
        raise UserError("would overwrite the model it was made from", place=str(out), remedy=remedy)
    rules = FAMILIES[model.config.model_type].names(model.config)
    items = tensors(*_with_head(rules, base, head), dtype)
    with _new_folder(out) as folder:
        write_files(items, folder, "model", max_shard_bytes, {"format": "pt"})
        verify(items, safetensors_files(folder), folder)
        config = _model_config(model, source, items[0].dtype.name)
        _write_json(folder / "config.json", config | (_scorer(model) if head else {}))
        _write_json(folder / "generation_config.json", _generation_config(source, stop_tokens))
        if tokenizer:
            tokenizer.save_pretrained(str(folder))
        else:
            for name in TOKENIZER_FILES:
                if (source.folder / name).exists():
                    shutil.copyfile(source.folder / name, folder / name)
    return out


def _with_head(
    rules: list[NameRule], tree: Params, head: Params | None, rule: NameRule = HEAD
) -> tuple[Params, list[NameRule]]:
    return (tree, rules) if head is None else (tree | {SCORE: head}, [*rules, rule])


def _scorer(model: Model) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model.config.model_type]
    return {"architectures": [name], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _adapter_config(model: Model, source: ModelSource) -> dict[str, Any]:
    config = model.adapter
    assert config is not None
    names = FAMILIES[model.config.model_type].names(model.config)
    return {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        **_base_name(source),
        **FORMS[config.peft_type].write(config, model.config, names),
        "inference_mode": True,
    }


def _base_name(source: ModelSource) -> dict[str, str | None]:
    """The base as others can find it: a local one by its full path, else by its name."""
    if source.name not in BUILTINS and Path(source.name).expanduser().exists():
        return {"base_model_name_or_path": str((source.gguf or source.folder).resolve()), "revision": None}
    name, _, revision = source.name.partition("@")
    return {"base_model_name_or_path": name, "revision": revision or None}


def _model_config(model: Model, source: ModelSource, dtype: str) -> dict[str, Any]:
    """The source's config.json (or what a GGUF's metadata says), true of what was written."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = open_checkpoint(source).config
    for stale in ("torch_dtype", "_name_or_path"):
        config.pop(stale, None)
    return config | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type]],
        "model_type": model.config.model_type,
        "tie_word_embeddings": model.config.tied,
        "dtype": dtype,
    }


def _generation_config(source: ModelSource, stop_tokens: Sequence[int]) -> dict[str, Any]:
    """The source's generation_config.json with the stop set that was trained."""
    file = source.folder / "generation_config.json"
    if source.gguf or not file.exists():
        config = open_checkpoint(source).config
        out = {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
    else:
        out = read_json(file)
    # Marked so, transformers would make the file anew from config.json.
    out.pop("_from_model_config", None)
    return out | ({"eos_token_id": _ids(stop_tokens)} if stop_tokens else {})


def _ids(stop_tokens: Sequence[int]) -> int | list[int]:
    ids = [int(t) for t in stop_tokens]
    return ids[0] if len(ids) == 1 else ids


def _write_json(file: Path, value: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` when everything in it is written.

    Only the first process's folder does; the others write nothing that stays. On any failure the new files
    go and `out` stays as it was.
    """
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / "new"
            folder.mkdir()
            yield folder
            if jax.process_index() == 0:
                _swap(folder, out, Path(temporary) / "old")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("export")  # now every process may load it
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            "the disk is full" if full else f"cannot be written: {error}",
            place=str(out),
            remedy=("free some space" if full else "check the folder's permissions")
            + ", or choose another folder; nothing that was there is lost",
        ) from error


def _swap(folder: Path, out: Path, old: Path) -> None:
    had = out.exists()
    if had:
        os.rename(out, old)
    try:
        os.rename(folder, out)
    except OSError:
        if had:
            os.rename(old, out)
        raise


def _check_replaceable(out: Path) -> None:
    """Raise `UserError` unless `out` is absent, empty, or an earlier export and nothing else."""
    if out.is_dir():
        names = {p.name for p in out.iterdir()}
        ours = {n for n in names if n in (*_OURS, *TOKENIZER_FILES) or n.endswith(".safetensors")}
        if not names or (names == ours and names & {"config.json", CONFIG_FILE}):
            return
        listed = ", ".join(sorted(names - ours)[:3]) or "no configuration"
    elif out.exists():
        listed = "a file"
    else:
        return
    raise UserError(
        f"would overwrite something that is no earlier export ({listed})",
        place=str(out),
        remedy="choose a new folder",
    )
