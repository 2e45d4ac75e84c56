"""Policies over one base: checked to be comparable, sampled into files, measured by their distance."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import distributed
from jaxalign.data.chat import Tokenizer, load_tokenizer
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.models.base import DTYPES, resolve_dtype
from jaxalign.models.hashing import adapter_hash, content_hash
from jaxalign.models.load import Loaded, load_adapter, load_model, open_checkpoint, stop_tokens
from jaxalign.models.source import resolve
from jaxalign.rl.rewards import Answer
from jaxalign.sampling.generate import answer_file
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.precompute import Reference, Subject, digest, kept
from jaxalign.types import Example, Group, ModelSource

KL = Subject("KL divergences", "delete the file: they are measured again")


@dataclass(frozen=True)
class Policy:
    """What gives answers. `label` is its short name, `identity` says which weights it has, and `stops` which
    tokens end its answers."""

    name: str
    label: str
    source: ModelSource
    base_hash: str
    identity: str
    tokenizer: Tokenizer
    stops: frozenset[int]

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens that it continues."""
        text = prompt.text if prompt.messages is None else prompt.messages
        assert text is not None, "a prompt has messages or text"
        return self.tokenizer.encode_prompt(text)

    def file(self, folder: Path, part: str, suffix: str) -> Path:
        """Where something about it lies: other weights of the same name have another file."""
        plain = re.sub(r"[^\w.-]+", "-", Path(self.name).name) or "model"
        mark = hashlib.sha256(self.identity.encode()).hexdigest()[:8]
        return folder / f"{part}-{plain}-{mark}{suffix}"


def open_policies(model: str, others: Sequence[str], prompts: Sequence[Prompt]) -> list[Policy]:
    """`model`, then `others`. Reads no weights.

    Raises `UserError` for one that cannot be opened, and for another that cannot be compared with `model`: of
    another base or tokenizer, one that writes a prompt in other tokens or ends its answers at others.
    """
    short = [Path(name).name for name in others]
    labels = [s if short.count(s) == 1 else name for s, name in zip(short, others, strict=True)]
    first = _open(model, "policy")
    found = [_open(name, label) for name, label in zip(others, labels, strict=True)]
    for policy in found:
        _check_comparable(first, policy, prompts)
    return [first, *found]


def _open(name: str, label: str) -> Policy:
    source = resolve(name)
    checkpoint, tokenizer = open_checkpoint(source), load_tokenizer(source)
    base = content_hash(checkpoint.files)
    stops = frozenset((*stop_tokens(source, checkpoint.config), *tokenizer.stop_tokens))
    return Policy(name, label, source, base, f"{base}+{adapter_hash(source.adapter)}", tokenizer, stops)


def _check_comparable(first: Policy, other: Policy, prompts: Sequence[Prompt]) -> None:
    place = f"compare: {other.name}"
    remedy = f"compare adapters that were trained over the base of {first.name}"
    if other.base_hash != first.base_hash:
        raise UserError(
            f"it has another base than {first.name} (sha256 {other.base_hash[:12]}, not "
            f"{first.base_hash[:12]})",
            place=place,
            remedy=f"{remedy}; a run with lora=null has a base of its own",
        )
    if _vocabulary(other) != _vocabulary(first):
        raise UserError(f"it has another tokenizer than {first.name}", place=place, remedy=remedy)
    odd = next((p for p in prompts if other.encode(p) != first.encode(p)), None)
    if odd is not None:
        raise UserError(
            f"its chat template writes a prompt otherwise than that of {first.name}: {odd.place}",
            place=place,
            remedy=f"{remedy}, with its chat template",
        )
    if other.stops != first.stops:
        told = f"{sorted(other.stops)}, not {sorted(first.stops)}"
        raise UserError(f"its answers end at other tokens ({told})", place=place, remedy=remedy)


def _vocabulary(policy: Policy) -> dict[str, int]:
    return policy.tokenizer.backend.get_vocab(with_added_tokens=True)


@dataclass(frozen=True)
class Sampled:
    """The answers of a policy: `completions[i]` are those to `prompts[i]`, as `generate` writes them with
    token ids. Prompts that leave no room for an answer are not among them."""

    policy: Policy
    prompts: list[Prompt]
    completions: list[list[dict[str, Any]]]

    def answers(self) -> list[Answer]:
        """All answers, prompt by prompt."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return [Answer(prompt, c["text"], c["finish"]) for prompt, row in pairs for c in row]

    def groups(self) -> list[Group]:
        """The very tokens that were sampled, a group for each prompt; the answers are the targets."""
        found = []
        for prompt, row in zip(self.prompts, self.completions, strict=True):
            head = np.asarray(self.policy.encode(prompt), np.int32)
            members = []
            for completion in row:
                tokens = np.concatenate([head, np.asarray(completion["ids"], np.int32)])
                members.append(Example(prompt.id, tokens, np.arange(len(tokens)) >= len(head)))
            found.append(Group(prompt.id, tuple(members)))
        return found


def sample(policy: Policy, prompts: Sequence[Prompt], file: Path, config: GenerateConfig) -> Sampled:
    """`config.n` answers to every prompt, streamed into `file`; what it holds already is not sampled again.

    Raises `UserError` as `answer_file` does, and where no prompt could be answered.
    """
    answer_file(policy.name, prompts, file, config, ids=True)
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    found = {row["id"]: row["completions"] for row in rows}
    answered = [prompt for prompt in prompts if prompt.id in found]
    if not answered:
        raise UserError(
            f"none of {len(prompts)} prompts leaves room for an answer of {config.max_tokens} tokens",
            place="max_tokens",
            remedy="lower it, or shorten the prompts",
        )
    return Sampled(policy, answered, [found[prompt.id] for prompt in answered])


@dataclass(frozen=True)
class Passes:
    """How log-probabilities are computed: `rows` prompts a pass over all devices together, logits divided by
    `temperature`, as the answers were drawn."""

    rows: int
    temperature: float
    dtype: str
    mesh: MeshConfig


@dataclass(frozen=True)
class Distance:
    """Measures how far policies are from `first` on their own answers. They share one base in memory."""

    first: Policy
    passes: Passes
    say: Callable[[str], None]

    def __call__(self, run: Sampled, file: Path) -> np.ndarray:
        """Nats, float64 [P, n]: sum_t log p_run - log p_first of every answer, both by teacher forcing. Its
        mean is an estimate of KL(run || first) without bias. Read from `file` where that has it."""
        groups = run.groups()
        made_from = {
            "weights": f"{run.policy.identity} from {self.first.identity}",
            "rows": digest(groups),
            "settings": f"temperature {self.passes.temperature:g}, {resolve_dtype(self.passes.dtype)}",
        }
        flat = kept(file, made_from, lambda: self._measured(run.policy, groups), KL, self.say)
        return np.asarray(flat, np.float64).reshape(len(groups), -1)

    def _measured(self, policy: Policy, groups: Sequence[Group]) -> np.ndarray:
        """The same, flat."""
        members = [member for group in groups for member in group.members]
        pairs = (self._log_probs(p, groups) for p in (policy, self.first))
        gaps = (own.astype(np.float64) - start for own, start in zip(*pairs, strict=True))
        return np.array([gap[m.mask].sum() for m, gap in zip(members, gaps, strict=True)])

    def _log_probs(self, policy: Policy, groups: Sequence[Group]) -> list[np.ndarray]:
        """float32 [T] of every answer under a policy."""
        loaded, mesh = self._base
        adapter, params = None, None
        if policy.source.adapter is not None:
            adapter, params, _ = load_adapter(loaded, policy.source.adapter, mesh)
        model = replace(loaded.model, adapter=adapter)
        reference = Reference(
            model, params, loaded.base, mesh, policy.identity, temperature=self.passes.temperature
        )
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        return reference.log_probs(
            groups,
            rows=-(-self.passes.rows // shards) * shards,
            max_length=max(len(member.tokens) for group in groups for member in group.members),
            pad_id=self.first.tokenizer.pad_id,
        )

    @cached_property
    def _base(self) -> tuple[Loaded, Any]:
        """The base on a mesh, without any adapter."""
        distributed.use_compile_cache()
        mesh, dtype = make_mesh(self.passes.mesh), DTYPES[resolve_dtype(self.passes.dtype)]
        source = replace(self.first.source, adapter=None)
        return load_model(source, mesh, param_dtype=dtype, compute_dtype=dtype), mesh
