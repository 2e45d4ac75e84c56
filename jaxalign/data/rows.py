"""The rows of a data set, and how some of them become a batch: what training and evaluation share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np

from jaxalign.data.layouts import Shape, choose, cost, holds
from jaxalign.data.packing import best_fit, bucket_widths, fill_row, round_up
from jaxalign.data.sharing import lay_out, shared_length
from jaxalign.errors import UserError
from jaxalign.types import Batch, Example, Group, Shared

Item = Example | Group

PADDING = -1  # in place of a row's index: a row that holds nothing


@dataclass(frozen=True)
class Rows:
    """Examples, several to a row where they are packed, or groups of answers, one to a row.

    Where the members of a group share a row (`Batch.shared`), the groups of a block may go into fewer rows.

    items    what was given; plan: the items of every row
    sizes    int64 [n], the longest member of every row, in tokens; where members share, the whole row
    widths   the row lengths that can occur: T, or S where members share a row
    group    G, the answers of a row of a batch
    rotated  member 1 is the row's own prompt with the answer of the row before it in the step
    members_in  T where members share a row, else None
    block    n, consecutive groups of a step that form a block
    shapes   (R, S), the rows of a block that can occur where members share rows, the cheapest first
    """

    items: list[Item]
    plan: list[list[int]]
    sizes: np.ndarray
    widths: tuple[int, ...]
    group: int
    rotated: bool
    max_length: int
    pad_id: int
    members_in: int | None = None
    block: int = 1
    shapes: tuple[Shape, ...] = ()

    def members(self, row: int, before: int = PADDING) -> list[list[Example]]:
        """The examples of each of the row's `group` members; `before` is the row whose answer is borrowed."""
        if row == PADDING:
            return [[]] * self.group
        if self.rotated:
            own = self.answer(row)
            strange = [] if before in (PADDING, row) else [self.mismatched(own, self.answer(before))]
            return [[own], strange]
        first = self.items[self.plan[row][0]]
        if isinstance(first, Example):
            return [[cast(Example, self.items[i]) for i in self.plan[row]]]
        return [[m] for m in first.members] + [[]] * (self.group - len(first.members))

    def answer(self, row: int) -> Example:
        """The first member of a row of groups."""
        return cast(Group, self.items[self.plan[row][0]]).members[0]

    def mismatched(self, own: Example, other: Example) -> Example:
        """The prompt of one row with the answer of another, cut at `max_length`."""
        prompt, answer = own.tokens[: prompt_length(own)], prompt_length(other)
        tokens = np.concatenate([prompt, other.tokens[answer:]])[: self.max_length]
        mask = np.concatenate([np.zeros(len(prompt), bool), other.mask[answer:]])[: self.max_length]
        return Example(own.id, tokens, mask)

    def before(self, wanted: np.ndarray) -> np.ndarray:
        """For every row of a step the one whose answer it borrows: the one before it, cyclically."""
        flat = wanted.ravel()
        real = flat != PADDING
        out = np.full_like(flat, PADDING)
        out[real] = np.roll(flat[real], 1)
        return out.reshape(wanted.shape)

    def lengths(self, wanted: np.ndarray) -> np.ndarray:
        """Tokens of the rows of a step, as `sizes`, with what is borrowed; 0 for `PADDING`."""
        if not self.rotated:
            return np.where(wanted == PADDING, 0, self.sizes[wanted])
        pairs = zip(wanted.ravel().tolist(), self.before(wanted).ravel().tolist(), strict=True)
        return np.asarray([self._size(self.members(*pair)) for pair in pairs]).reshape(wanted.shape)

    def _size(self, members: list[list[Example]]) -> int:
        """Tokens of the row that these members need."""
        alone = [member[0] for member in members if member]
        if self.members_in is not None:
            return shared_length(alone)
        return max((len(e.tokens) for e in alone), default=0)

    def width(self, lengths: np.ndarray) -> int:
        """The smallest of `widths` that takes a step of these `lengths`, all of its micro-batches on all
        processes."""
        return next(width for width in self.widths if width >= lengths.max())

    def shape(self, lengths: np.ndarray) -> Shape:
        """The first of `shapes` that holds a step, as `width`."""
        blocks = lengths.reshape(-1, self.block)
        return next(shape for shape in self.shapes if holds(shape, blocks))

    def work(self, steps: Iterable[np.ndarray]) -> tuple[int, int, float]:
        """What the model computes in steps of these `lengths`, of rows that members share: (tokens, tokens
        with padding, their cost in tokens of a short row)."""
        held, computed, spent = 0, 0, 0.0
        for lengths in steps:
            shape, blocks = self.shape(lengths), lengths.size // self.block
            held, computed = held + int(lengths.sum()), computed + blocks * math.prod(shape)
            spent += blocks * cost(shape)
        return held, computed, spent

    def batch(self, wanted: np.ndarray, mine: slice = slice(None)) -> Batch:
        """Leaves [*leading, B, G, T] of the slice `mine` of a step's rows `wanted` [*leading, B'], those of
        all processes."""
        lengths = self.lengths(wanted)
        width = self.members_in or self.width(lengths)
        before, wanted = self.before(wanted)[..., mine], wanted[..., mine]
        pairs = zip(wanted.ravel().tolist(), before.ravel().tolist(), strict=True)
        groups = [self.members(*pair) for pair in pairs]
        parts = [part for members in groups for part in members]
        aux = {
            name: np.stack([self._aux(name, row) for row in wanted.ravel().tolist()]).reshape(
                *wanted.shape, *blank.shape
            )
            for name, blank in self.blank_aux.items()
        }
        shape = (*wanted.shape, self.group)
        for name in self.token_aux:
            values = [_padded(part, name, width) for part in parts]
            aux[name] = np.stack(values).reshape(*shape, -1)
        batch = stack(parts, width, self.pad_id, shape, aux)
        if self.members_in is None:
            return batch
        return replace(batch, shared=self._shared(groups, self.shape(lengths), wanted.shape[:-1]))

    def _shared(self, groups: list[list[list[Example]]], rows: Shape, leading: tuple[int, ...]) -> Shared:
        """`Batch.shared` of groups, leaves [*leading, N, ...]."""
        alone = [[member[0] for member in members if member] for members in groups]
        blocks = [alone[at : at + self.block] for at in range(0, len(alone), self.block)]
        shared = lay_out(blocks, rows, (self.group, self.members_in or 0), self.pad_id)
        return jax.tree.map(lambda x: x.reshape(*leading, -1, *x.shape[1:]), shared)

    @property
    def token_aux(self) -> tuple[str, ...]:
        """Names of what came with every token of the answers."""
        return tuple(members_of(self.items[0])[0].aux)

    @property
    def blank_aux(self) -> dict[str, np.ndarray]:
        """What a row of padding has as aux: NaN, or False."""
        first = self.items[0]
        found = first.aux if isinstance(first, Group) else {}
        return {name: self._blank(np.asarray(value)) for name, value in found.items()}

    def _blank(self, like: np.ndarray) -> np.ndarray:
        kind = np.bool_ if like.dtype == np.bool_ else np.float32
        return np.full((self.group,) * like.ndim, False if kind is np.bool_ else np.nan, kind)

    def _aux(self, name: str, row: int) -> np.ndarray:
        """One value of a row; an array is filled up to [G]."""
        out = self.blank_aux[name]
        if row != PADDING:
            value = np.asarray(cast(Group, self.items[self.plan[row][0]]).aux[name])
            out[(slice(value.size),) if value.ndim else ()] = value
        return out

    def abstract(self, leading: tuple[int, ...]) -> list[Batch]:
        """A batch of shapes and dtypes [*leading, G, T], `leading` ending with B, for each of `shapes`, or of
        `widths`, the smallest first."""

        def shaped(shape: tuple[int, ...], dtype: Any, leading: tuple[int, ...] = leading) -> Any:
            return jax.ShapeDtypeStruct((*leading, *shape), dtype)

        aux = {name: shaped(blank.shape, blank.dtype) for name, blank in self.blank_aux.items()}
        kinds = (np.int32, np.bool_, np.int32, np.int32)  # tokens, mask, segments, positions
        blocks = (*leading[:-1], leading[-1] // self.block)

        def batch(width: int, shape: Shape | None = None) -> Batch:
            size = (self.group, width)
            each = {name: shaped(size, np.float32) for name in self.token_aux}
            shared = None
            if shape:
                row = shaped(shape, np.int32, blocks)
                shared = Shared(row, row, row, shaped((self.block, *size), np.int32, blocks))
            return Batch(*(shaped(size, kind) for kind in kinds), aux=aux | each, shared=shared)

        if self.members_in is None:
            return [batch(width) for width in self.widths]
        return [batch(self.members_in, shape) for shape in self.shapes]

    @property
    def own_members(self) -> list[Example]:
        """All examples, those of groups one by one; borrowed answers are not counted."""
        return [m for item in self.items for m in members_of(item)]


def arrange(
    items: Sequence[Item],
    *,
    max_length: int,
    packing: bool = False,
    group: int | None = None,
    share: bool = False,
    buckets: Sequence[int] | None = None,
    pad_id: int = 0,
) -> Rows:
    """The rows of a data set. `group` None or 0: as many answers as the longest group has; 2 over groups of
    one: the second is borrowed (`Rows.rotated`). `share`: the members of a group stand in one row, with
    their prompt once.

    Raises `UserError` for no items, a member over `max_length`, packed groups, or a group that is too large.
    """
    if not items:
        remedy = "look at the rows with `jaxalign inspect data`"
        raise UserError("no examples to make batches of", remedy=remedy)
    grouped = isinstance(items[0], Group)
    if grouped and packing:
        cause = "packing puts several rows into one, and answers that are compared stay apart"
        raise UserError(cause, place="packing", remedy="set packing=false")
    most = max(len(members_of(item)) for item in items)
    rotated = grouped and most == 1 and group == 2
    if group and most > group:
        worst = next(item for item in items if len(members_of(item)) > group)
        raise UserError(f"row {worst.id} has {len(members_of(worst))} answers, the method takes {group}")
    lengths = np.asarray([max(len(e.tokens) for e in members_of(item)) for item in items], np.int64)
    _check_longest(items, lengths, max_length)
    plan = best_fit(lengths, round_up(max_length)) if packing else [[i] for i in range(len(lengths))]
    sizes = np.asarray([int(lengths[row].sum()) for row in plan])
    longest, members = int(sizes.max()), group or most
    if rotated:
        own = [members_of(item)[0] for item in items]
        mixed = max(prompt_length(e) for e in own) + max(_answer_length(e) for e in own)
        longest = max(longest, min(mixed, max_length))
    members_in = round_up(longest) if share and grouped and members > 1 else None
    if members_in is not None:
        sizes = np.asarray([shared_length(members_of(item)) for item in items])
        # A borrowed answer comes on top, with the last token of the prompt once more.
        borrowed = 1 + max(_answer_length(members_of(i)[0]) for i in items) if rotated else 0
        longest = int(sizes.max()) + borrowed
    widths = (round_up(longest),) if packing else bucket_widths(buckets, longest)
    rows = Rows(list(items), plan, sizes, widths, members, rotated, max_length, pad_id, members_in)
    return in_blocks(rows, 1)


def in_blocks(rows: Rows, block: int, steps: Sequence[np.ndarray] = ()) -> Rows:
    """The rows with `block` groups to a block, in whichever of two ways costs less over `steps` (the rows of
    each, of all processes): a row for each group, of one of `widths`, or several groups to a row, in shapes
    that `layouts.choose` has found. Without steps it is the first. Either way there are at most four shapes.

    Examples, and groups whose members do not share a row, stay as they are.
    """
    if rows.members_in is None:
        return rows
    apart = replace(rows, block=block, shapes=tuple((block, width) for width in rows.widths))
    if not steps:
        return apart
    lengths = [rows.lengths(wanted) for wanted in steps]
    found = choose([of.reshape(-1, block) for of in lengths], block, rows.widths[-1])
    return min((apart, replace(apart, shapes=found)), key=lambda way: way.work(lengths)[2])


def members_of(item: Item) -> tuple[Example, ...]:
    """The answers of a group, or the example alone."""
    return item.members if isinstance(item, Group) else (item,)


def prompt_length(example: Example) -> int:
    """Tokens before the first target."""
    return int(example.mask.argmax())


def _answer_length(example: Example) -> int:
    return len(example.tokens) - prompt_length(example)


def _check_longest(items: Sequence[Item], lengths: np.ndarray, max_length: int) -> None:
    worst = int(lengths.argmax())
    if lengths[worst] > max_length:
        cause = f"example {items[worst].id} has {lengths[worst]} tokens, more than max_length={max_length}"
        raise UserError(cause, remedy="tokenize with the same max_length")


def _padded(members: Sequence[Example], name: str, length: int) -> np.ndarray:
    """float32 [length]: what the tokens have of that name; 0 behind the end."""
    out = np.zeros(length, np.float32)
    for member in members:
        out[: len(member.tokens)] = member.aux[name]
    return out


def stack(
    rows: Sequence[Sequence[Example]],
    length: int,
    pad_id: int,
    leading: tuple[int, ...],
    aux: dict[str, Any] | None = None,
) -> Batch:
    """Rows of examples as a `Batch` with leaves [*leading, T = length]."""
    filled = [fill_row(row, length, pad_id) for row in rows]
    arrays = (np.stack(leaf).reshape(*leading, length) for leaf in zip(*filled, strict=True))
    tokens, mask, segments, positions = arrays
    return Batch(tokens, mask, segments, positions, aux or {})
