"""The tokenizer inside a .gguf file, as a `tokenizers` object: no torch, no transformers.

transformers reads it too, but only where torch is installed, and without the digit splitting of `smollm`.
File layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the split patterns are llama.cpp's
(`llama-vocab.cpp`), which took them from each model's tokenizer.json.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxalign.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"

# `tokenizer.ggml.pre` -> patterns, applied one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (_DIGITS, _GPT2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """`backend` is a `tokenizers.Tokenizer` that adds no special tokens; the rest is the file's metadata."""

    backend: Any
    chat_template: str | None
    bos: str | None
    eos: str | None
    pad: str | None
    unk: str | None
    end_of_turn: str | None
    add_bos: bool


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value part of a .gguf file. Raises `UserError` for another kind of file or one cut off."""
    try:
        with path.open("rb") as stream:
            magic, version, _, count = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise UserError(
                    "not a GGUF file of version 2 or 3", place=str(path), remedy="convert it again"
                )
            found = {}
            for _ in range(count):
                key = _value(stream, _STRING)
                found[key] = _value(stream, _scalar(stream, "I"))
            return found
    except (struct.error, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise UserError(
            "the GGUF header is cut off or damaged", place=str(path), remedy="fetch it again"
        ) from error


def _scalar(stream: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, stream.read(struct.calcsize("<" + code)))[0]


def _value(stream: BinaryIO, kind: int) -> Any:
    """One value of GGUF type `kind` at the stream's position."""
    if kind == _STRING:
        length = _scalar(stream, "Q")
        text = stream.read(length)
        if len(text) != length:
            raise struct.error("cut off")
        return text.decode("utf-8")
    if kind == _ARRAY:
        item, length = struct.unpack("<IQ", stream.read(12))
        if item in (_STRING, _ARRAY):
            return [_value(stream, item) for _ in range(length)]
        code = f"<{length}{_SCALARS[item]}"
        return list(struct.unpack(code, stream.read(struct.calcsize(code))))
    return _scalar(stream, _SCALARS[kind])


def load_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """The file's tokenizer. Raises `UserError` for a kind that is not known: text would be split wrongly."""
    meta = {key.removeprefix("tokenizer."): value for key, value in read_metadata(path).items()}
    tokens = meta.get("ggml.tokens")
    if not tokens:
        raise UserError(
            "the GGUF file holds no tokenizer", place=str(path), remedy="give the model's folder instead"
        )
    model = meta.get("ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise UserError(
            f"unknown GGUF tokenizer {model!r}", place=str(path), remedy=f"known: {', '.join(builders)}"
        )
    backend = builders[model](meta, path)
    _add_special(backend, tokens, meta.get("ggml.token_type") or (), byte_level=model == "gpt2")

    def token(name: str) -> str | None:
        index = meta.get(f"ggml.{name}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else None

    # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    add_bos = bool(meta.get("ggml.add_bos_token", model == "llama"))
    return GgufTokenizer(
        backend=backend,
        chat_template=meta.get("chat_template"),
        bos=token("bos"),
        eos=token("eos"),
        pad=token("padding"),
        unk=token("unknown"),
        end_of_turn=token("eot"),
        add_bos=add_bos,
    )


def _byte_level(meta: dict[str, Any], path: Path) -> Any:
    """Byte-level BPE (`gpt2`) with the split patterns that the file's `pre` names."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = meta.get("ggml.pre", "default")
    if pre not in SPLITS:
        remedy = "give the model's folder (tokenizer.json) instead of the .gguf"
        raise UserError(f"unknown pre-tokenizer {pre!r}", place=str(path), remedy=remedy)
    vocab = {token: index for index, token in enumerate(meta["ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["ggml.merges"]]
    backend: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    # Each pattern works inside the pieces of the one before, as in llama.cpp.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: dict[str, Any], path: Path) -> Any:
    """Sentencepiece BPE with byte fallback (`llama`: Llama 2, Mistral, Gemma)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    gemma = str(meta.get("general.architecture", "")).startswith("gemma")
    # Gemma's tokens of several spaces are stored as spaces.
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in meta["ggml.tokens"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Gemma merges in the order of its vocabulary, which its scores do not follow.
    rank = [-i for i in range(len(tokens))] if gemma else meta["ggml.scores"]
    merges = (
        [tuple(m.split(" ", 1)) for m in meta["ggml.merges"]]
        if "ggml.merges" in meta
        else _merges(tokens, rank)
    )
    backend: Any = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(meta.get("ggml.add_space_prefix", not gemma))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return backend


def _merges(tokens: list[str], rank: Sequence[float]) -> list[tuple[str, str]]:
    """The merges a sentencepiece vocabulary implies: each split of a token in two, best token first."""
    index = {token: i for i, token in enumerate(tokens)}
    out = []
    for i, token in enumerate(tokens):
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in index and right in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        out += [(-rank[i], i, order, pair) for order, pair in enumerate(pairs)]
    out.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in out]


def _add_special(backend: Any, tokens: list[str], kinds: Any, *, byte_level: bool) -> None:
    """Mark the control tokens (never cut, dropped from plain text) and user-defined ones (never cut)."""
    from tokenizers import AddedToken

    vocab = backend.get_vocab()
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL and t in vocab]
    own = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED and t in vocab]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in own])
