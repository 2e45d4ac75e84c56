"""A model on this machine: the sampling engine, and log-probs of given texts by teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.data.chat import Tokenizer
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Likelihood, Prompt, Question, Reply, Request
from jaxalign.llm.settings import LLMConfig
from jaxalign.models.hashing import adapter_hash
from jaxalign.models.source import resolve
from jaxalign.sampling.engine import Engine, Sample
from jaxalign.sampling.load import load_engine
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.sharding import make_mesh
from jaxalign.train.precompute import Reference
from jaxalign.types import Example, Group, SamplingParams

SCORED_TOKENS = 8192  # of all rows of one pass that scores given texts


@dataclass(frozen=True)
class LocalLLM:
    """A loaded model. `scorer` gives the log-probs of given tokens, from the very weights that sample."""

    name: str
    identity: str
    engine: Engine
    tokenizer: Tokenizer
    scorer: Reference
    shards: int

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Replies as they finish; all requests share the engine's slots. A prompt that leaves no room for
        `max_tokens`, or that the chat template refuses, is a fault."""
        prompts, params, index = [], [], []
        for i, request in enumerate(requests):
            tokens = self._encoded(request.prompt)
            fault = tokens if isinstance(tokens, str) else self._no_room(tokens, request)
            if fault:
                yield i, Reply(fault=fault)
                continue
            prompts.append(tokens)
            params.append(_params(request))
            index.append(i)
        parts: dict[int, dict[int, Sample]] = {}
        for at, number, sample in self.engine.stream(prompts, params):
            part = parts.setdefault(at, {})
            part[number] = sample
            if len(part) == params[at].n:
                done = tuple(_completion(part[k]) for k in range(params[at].n))
                del parts[at]
                yield index[at], Reply(done, len(prompts[at]))

    def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
        """Exact: prompt and option are encoded apart, and the option's tokens are summed. Of an option after
        nothing at all, not even a BOS, its first token is not counted: nothing foretells it."""
        found: list[list[Likelihood] | str] = [""] * len(questions)
        groups, index = [], []
        for i, question in enumerate(questions):
            made = self._group(question, str(i))
            if isinstance(made, str):
                found[i] = made
            else:
                groups.append(made)
                index.append(i)
        for i, scored in zip(index, self._scored(groups), strict=True):
            found[i] = scored
        return found

    def _scored(self, groups: list[Group]) -> Iterator[list[Likelihood]]:
        if not groups:
            return
        longest = max(len(member.tokens) for group in groups for member in group.members)
        rows = max(1, SCORED_TOKENS // (longest * self.shards)) * self.shards
        logps = iter(
            self.scorer.log_probs(groups, rows=rows, max_length=longest, pad_id=self.tokenizer.pad_id)
        )
        for group in groups:
            pairs = [(next(logps), member.mask) for member in group.members]
            yield [Likelihood(float(logp[mask].sum()), int(mask.sum())) for logp, mask in pairs]

    def _group(self, question: Question, name: str) -> Group | str:
        prompt = self._encoded(question.prompt)
        if isinstance(prompt, str):
            return prompt
        members = []
        for option in question.options:
            tokens = self.tokenizer.encode(option)
            if not tokens:
                return "an empty option"
            if len(prompt) + len(tokens) > self.engine.max_length:
                return f"longer than {self.engine.max_length} tokens"
            mask = np.arange(len(prompt) + len(tokens)) >= max(1, len(prompt))
            if not mask.any():
                return "one token after nothing"
            members.append(Example(name, np.array(prompt + tokens, np.int32), mask))
        return Group(name, tuple(members))

    def _encoded(self, prompt: Prompt) -> list[int] | str:
        """Its tokens, or why it has none."""
        try:
            return self.tokenizer.encode_prompt(prompt)
        except UserError as error:
            return error.cause

    def _no_room(self, tokens: list[int], request: Request) -> str:
        room = self.engine.max_length - request.max_tokens
        return f"a prompt of {len(tokens)} tokens, longer than {room}" if len(tokens) > room else ""


def _params(request: Request) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop=request.stop,
        n=request.n,
        seed=request.seed % 2**32,
    )


def _completion(sample: Sample) -> Completion:
    return Completion(sample.text, sample.finish, len(sample.tokens), float(sample.logp.sum()))


def load_local(name: str, config: LLMConfig) -> LocalLLM:
    """Anything that `-m` takes. Raises `UserError` as `resolve` and `load_model` do, and for a model without
    a usable chat template only where turns are asked of it."""
    settings = GenerateConfig(batch_size=config.batch_size, dtype=config.dtype, mesh=config.mesh)
    engine, tokenizer, base_hash = load_engine(name, settings)
    engine.max_length = min(config.max_length or engine.max_length, engine.max_length)
    source = resolve(name)
    identity = f"{base_hash}+{adapter_hash(source.adapter)}"
    mesh = make_mesh(config.mesh)
    scorer = Reference(engine.model, None, engine.base, mesh, identity)
    return LocalLLM(name, identity, engine, tokenizer, scorer, mesh.shape["data"] * mesh.shape["fsdp"])
