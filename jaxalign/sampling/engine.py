"""The host side of sampling: requests queue, slots are refilled as they end, finished samples stream out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.decoder import Model, unstack
from jaxalign.sampling import slots as device
from jaxalign.sampling.buckets import bucket, groups, width
from jaxalign.sampling.samplers import Features, Settings
from jaxalign.types import Params, SamplingParams

Watch = Callable[[int, int, list[int]], None]


@dataclass(eq=False)
class Asked:
    """A request on its way through an engine: a prompt that `Engine.checked` has passed.

    number   names it in what `Engine.serve` yields
    dropped  set it, from any thread, and the request frees its slots without a sample more
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    dropped: bool = False


# Requests that have come since it was called last, None once no more will. True: nothing is under way, so it
# may wait for somebody to come.
Feed = Callable[[bool], Sequence[Asked] | None]


@dataclass(frozen=True)
class Sample:
    """One answer.

    tokens       int32 [T], the stop token included
    logp         float32 [T], under the model: temperature 1, nothing filtered
    sample_logp  float32 [T], under the distribution each token was drawn from
    finish       "stop" (a stop token or string) or "length"
    text         decoded, without stop token and stop string; "" where the engine has no decoder
    """

    tokens: np.ndarray
    logp: np.ndarray
    sample_logp: np.ndarray
    finish: str
    text: str = ""


@dataclass
class _Row:
    """One sample under way."""

    asked: Asked
    sample: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    sample_logp: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """What it continues."""
        return self.asked.prompt

    @property
    def params(self) -> SamplingParams:
        """How it is sampled."""
        return self.asked.params

    @property
    def last(self) -> int:
        """Position of the newest token."""
        return len(self.prompt) + len(self.tokens) - 1


class Engine:
    """Continuous batching over at most `slots` rows on static shapes.

    base          weights with the adapter merged in (`Model.merge`)
    decode        token ids -> text, needed for stop strings and `Sample.text`
    stop_tokens   end every answer, besides each request's own
    max_length    longest prompt and answer together; the model's own limit by default
    steps         tokens sampled between two looks of the host
    shards        devices that the rows of a batch are cut over: rows come in multiples of it
    together      fewer prompts than this are filled up, so that few sizes of prefills are compiled
    """

    def __init__(
        self,
        model: Model,
        base: Params,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        stop_tokens: tuple[int, ...] = (),
        slots: int = 64,
        max_length: int | None = None,
        steps: int = 32,
        shards: int = 1,
        together: int = 8,
    ) -> None:
        # Per-layer weights: slices of stacked ones would be copied for every token.
        self.base = base | {"layers": unstack(base["layers"])}
        self.model, self.text, self.stop_tokens = model, decode, stop_tokens
        # XLA's bfloat16 product with one row is over ten times slower than with two on a CPU.
        self.fewest = max(bucket(shards), 2 if model.numerics.compute == jnp.bfloat16 else 1)
        self.slots, self.steps, self.together = max(bucket(slots), self.fewest), steps, together
        self.max_length = max_length or model.config.max_positions

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Sample]]:
        """`params.n` samples of every prompt, in the order of the prompts."""
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        out: list[list[Any]] = [[None] * p.n for p in every]
        for request, index, sample in self.stream(prompts, every):
            out[request][index] = sample
        return out

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, int, Sample]]:
        """(request, sample index, sample) as they finish. What a request gets does not depend on the others.

        `watch` is told (request, sample index, tokens so far) of rows that go on, after every round.
        """
        each = zip(prompts, params, strict=True)
        asked = [
            Asked(i, self.checked(list(prompt), p, f"request {i}"), p) for i, (prompt, p) in enumerate(each)
        ]
        everybody = iter([asked])
        yield from self.serve(lambda idle: next(everybody, None), watch)

    def serve(self, feed: Feed, watch: Watch | None = None) -> Iterator[tuple[int, int, Sample]]:
        """`stream` of requests that join while others run: `feed` is called before every round.

        Ends when the feed has and everybody is answered.
        """
        while (asked := feed(True)) is not None:
            if asked:
                yield from _Run(self, asked, feed, watch).finished()

    def checked(self, prompt: list[int], params: SamplingParams, place: str) -> list[int]:
        """The prompt. Raises `UserError` where it cannot be sampled from like that."""
        vocabulary = self.model.config.vocab_size
        if not prompt:
            raise UserError("empty prompt", place=place, remedy="give at least one token")
        if max(prompt) >= vocabulary or min(prompt) < 0:
            remedy = "use the tokenizer that belongs to the model"
            raise UserError(
                f"a token id is outside of the vocabulary ({vocabulary})", place=place, remedy=remedy
            )
        if params.max_tokens < 1:
            raise UserError(f"max_tokens is {params.max_tokens}", place=place, remedy="ask for at least 1")
        total = len(prompt) + params.max_tokens
        if total > self.max_length:
            raise UserError(
                f"prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} pass the limit of "
                f"{self.max_length}",
                place=place,
                remedy="shorten the prompt or lower max_tokens",
            )
        if params.stop and self.text is None:
            raise UserError("stop strings need a tokenizer", place=place, remedy="give Engine a decoder")
        return prompt


NOBODY = Asked(-1, [0], SamplingParams())  # what stands in an empty slot


class _Run:
    """The queue, the slots, and which row is where: from the first requests until nothing is under way."""

    def __init__(self, engine: Engine, asked: Sequence[Asked], feed: Feed, watch: Watch | None) -> None:
        self.engine, self.feed, self.watch = engine, feed, watch
        self.waiting: list[_Row] = []
        self.features, self.stop_width = Features.of([]), 1
        self.longest, self.size = 128, 0
        self._admit(asked)
        self.rows: list[_Row | None] = [None] * self._slots(len(self.waiting))
        self.state = self._empty()

    def _admit(self, asked: Sequence[Asked]) -> None:
        """Puts requests at the end of the queue, and makes the programs fit them."""
        rows = [_Row(one, j) for one in asked for j in range(one.params.n)]
        self.waiting = rows[::-1] + self.waiting
        params = [one.params for one in asked]
        self.features |= Features.of(params)
        self.stop_width = bucket(max((len(self._stops(p)) for p in params), default=1), self.stop_width)
        # The cache doubles as rows grow, but not beyond what the longest of all will need.
        need = max((len(one.prompt) + one.params.max_tokens for one in asked), default=0)
        self.longest = max(self.longest, width(1 + need, 64))

    def _slots(self, rows: int) -> int:
        return min(bucket(rows, self.engine.fewest), self.engine.slots)

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        return (*self.engine.stop_tokens, *params.stop_tokens)

    def finished(self) -> Iterator[tuple[int, int, Sample]]:
        """Run until queue and slots are empty."""
        while self.waiting or any(self.rows):
            self._refill()
            active = sum(row is not None for row in self.rows)
            # Come back when an eighth of the slots has ended and somebody waits for them.
            wanted = active - max(1, len(self.rows) // 8) if self.waiting else 0
            self._shape()
            engine = self.engine
            self.state, out = device.decode(
                engine.model, self.features, engine.steps, engine.base, self.state, np.int32(wanted)
            )
            yield from self._collect(jax.device_get(out), np.asarray(self.state.active))
            self._join()

    def _join(self) -> None:
        """Lets go who was dropped meanwhile, and in who has come."""
        self.waiting = [row for row in self.waiting if not row.asked.dropped]
        gone = [i for i, row in enumerate(self.rows) if row is not None and row.asked.dropped]
        for i in gone:
            self.rows[i] = None
        self._halt(gone)
        came = self.feed(False)
        if not came:
            return
        before = (self.features.penalty, self.stop_width)
        self._admit(came)
        if before != (self.features.penalty, self.stop_width):
            nobody = _Row(NOBODY, 0)
            wider = self._states([row or nobody for row in self.rows])
            self.state = replace(self.state, stops=jnp.asarray(wider.stops), seen=jnp.asarray(wider.seen))

    def _refill(self) -> None:
        held = sum(row is not None for row in self.rows)
        self.rows += [None] * (self._slots(held + len(self.waiting)) - len(self.rows))
        free = [i for i, row in enumerate(self.rows) if row is None]
        taken = [(i, self.waiting.pop()) for i in free[: len(self.waiting)]]
        if not taken:
            return
        for i, row in taken:
            self.rows[i] = row
        self._shape()
        # A prompt is prefilled once for all of its samples.
        samples: dict[int, list[tuple[int, _Row]]] = {}
        for i, row in taken:
            samples.setdefault(row.asked.number, []).append((i, row))
        each = list(samples.values())
        # The last token of a prompt is the first input of decoding.
        lengths = [len(group[0][1].prompt) - 1 for group in each]
        for members, rows, columns in groups(lengths, self._fewest()):
            self._prefill([each[m] for m in members], rows, min(columns, self.size))

    def _fewest(self) -> int:
        return max(min(len(self.rows), self.engine.together), self.engine.fewest)

    def _prefill(self, samples: list[list[tuple[int, _Row]]], rows: int, columns: int) -> None:
        """Starts the samples of some prompts, by a prefill of that many rows and columns."""
        engine = self.engine
        tokens, lengths = np.zeros((rows, columns), np.int32), np.zeros((rows,), np.int32)
        for p, group in enumerate(samples):
            prompt = group[0][1].prompt[:-1]
            tokens[p, : len(prompt)], lengths[p] = prompt, len(prompt)
        placed = [(i, row, p) for p, group in enumerate(samples) for i, row in group]
        many = bucket(len(placed), self._fewest())
        where, prompt_of = np.full((many,), len(self.rows), np.int32), np.zeros((many,), np.int32)
        for m, (i, _, p) in enumerate(placed):
            where[m], prompt_of[m] = i, p
        starts = [row for _, row, _ in placed]
        states = self._states(starts + starts[:1] * (many - len(placed)))
        self.state = device.prefill(
            engine.model, engine.base, self.state, tokens, lengths, prompt_of, where, states
        )

    def _states(self, rows: list[_Row]) -> device.Slots:
        """All of `Slots` but the cache, for rows that are about to start."""
        vocabulary = self.engine.model.config.vocab_size
        stops = np.full((len(rows), self.stop_width), -1, np.int32)
        seen = np.zeros((len(rows), vocabulary if self.features.penalty else 0), bool)
        for m, row in enumerate(rows):
            own = self._stops(row.params)
            stops[m, : len(own)] = own
            if self.features.penalty:
                seen[m, row.prompt + row.tokens] = True
        integer = lambda values: np.array(values, np.int32)  # noqa: E731
        return device.Slots(
            cache=[],
            token=integer([row.prompt[-1] for row in rows]),
            position=integer([len(row.prompt) - 1 for row in rows]),
            emitted=np.zeros((len(rows),), np.int32),
            limit=integer([row.params.max_tokens for row in rows]),
            active=np.ones((len(rows),), bool),
            stops=stops,
            seen=seen,
            settings=Settings.of([(row.params, row.sample) for row in rows]),
        )

    def _empty(self) -> device.Slots:
        """Slots in which nothing runs, with a cache of one position: `_shape` gives them their size."""
        n = len(self.rows)
        state = self._states([_Row(NOBODY, 0)] * n)
        cache = self.engine.model.empty_cache(n, 1)
        state = jax.tree.map(jnp.asarray, replace(state, cache=cache))
        return device.resize(state, np.full((n,), -1, np.int32), 1)

    def _shape(self) -> None:
        """Make the cache long enough for the next call; drop slots, or a cache's length, once most of them
        stay empty."""
        held = [i for i, row in enumerate(self.rows) if row is not None]
        need = 1 + max(
            min(row.last + self.engine.steps, len(row.prompt) + row.params.max_tokens)
            for row in self.rows
            if row is not None
        )
        size = min(bucket(need, 128), self.longest)
        if size < self.size < 4 * size:
            size = self.size
        slots, old = len(self.rows), self.state.token.shape[0]
        if not self.waiting and len(held) * 4 <= slots:
            slots = self._slots(len(held))
        if (size, slots) == (self.size, old):
            return
        where = [i if i < old else -1 for i in range(slots)]
        if slots != len(self.rows):
            where = held + [-1] * (slots - len(held))
            self.rows = [self.rows[i] if i >= 0 else None for i in where]
        self.state = device.resize(self.state, np.array(where, np.int32), size)
        self.size = size

    def _collect(self, out: device.Emitted, active: np.ndarray) -> Iterator[tuple[int, int, Sample]]:
        cut = []
        for i, row in enumerate(self.rows):
            if row is None:
                continue
            count = int(out.count[i])
            row.tokens += out.tokens[i, :count].tolist()
            row.logp += out.logp[i, :count].tolist()
            row.sample_logp += out.sample_logp[i, :count].tolist()
            sample = self._finish(row, bool(active[i]))
            if sample is not None:
                if active[i]:
                    cut.append(i)
                self.rows[i] = None
                yield row.asked.number, row.sample, sample
            elif self.watch is not None:
                self.watch(row.asked.number, row.sample, row.tokens)
        self._halt(cut)  # rows that a stop string has ended still run on the device

    def _halt(self, slots: list[int]) -> None:
        if slots:
            active = np.array(self.state.active)
            active[slots] = False
            self.state = self.state.with_active(active)

    def _finish(self, row: _Row, active: bool) -> Sample | None:
        """The finished sample, or None while it runs."""
        decode, tokens = self.engine.text, row.tokens
        stop_tokens = self._stops(row.params)
        finish = "stop" if tokens and tokens[-1] in stop_tokens else "length"
        count, text = len(tokens), ""
        if decode is not None and (row.params.stop or not active):
            end = count - 1 if finish == "stop" else count
            text = decode(tokens[:end])
            found = [text.find(s) for s in row.params.stop if s in text]
            if found:
                text, finish = text[: min(found)], "stop"
                count = _tokens_until(decode, tokens, row.params.stop)
                active = False
        if active:
            return None
        array = lambda values: np.array(values[:count], np.float32)  # noqa: E731
        return Sample(
            np.array(tokens[:count], np.int32), array(row.logp), array(row.sample_logp), finish, text
        )


def _tokens_until(decode: Callable[[Sequence[int]], str], tokens: list[int], stops: tuple[str, ...]) -> int:
    """The fewest tokens whose text holds a stop string: found by bisection, for text only grows."""
    lo, hi = 1, len(tokens)
    while lo < hi:
        mid = (lo + hi) // 2
        text = decode(tokens[:mid])
        if any(s in text for s in stops):
            hi = mid
        else:
            lo = mid + 1
    return lo
