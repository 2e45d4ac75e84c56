from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.data.batching import BatchSource, eval_batches
from jaxalign.errors import UserError
from jaxalign.types import Batch, Example, Group, Shared

LEAVES = ("tokens", "mask", "segments", "positions")


def answer(group: int, member: int, prompt: int, size: int) -> Example:
    """Every prompt token is the group's number, every answer token names group and member."""
    tokens = np.asarray([group] * prompt + [1000 + 10 * group + member] * size, np.int32)
    return Example(str(group), tokens, np.arange(prompt + size) >= prompt)


def pairs(count: int = 21) -> list[Group]:
    def made(i: int) -> Group:
        members = (answer(i, 0, 3 + i % 5, 4 + 5 * i % 90), answer(i, 1, 3 + i % 5, 9))
        return Group(str(i), members, {"margin": np.float32("nan" if i % 3 else i)})

    return [made(i) for i in range(count)]


def lists() -> list[Group]:
    sizes = (2, 4, 3, 2, 2, 3)
    return [
        Group(
            str(i),
            tuple(answer(i, m, 2, 3 + m) for m in range(n)),
            {"scores": -np.arange(n, dtype=np.float32)},
        )
        for i, n in enumerate(sizes)
    ]


def labels(count: int = 9) -> list[Group]:
    return [
        Group(str(i), (answer(i, 0, 2 + 6 * i, 3 + 7 * (count - i)),), {"label": np.bool_(i % 2)})
        for i in range(count)
    ]


def source(groups: list[Group], **options) -> BatchSource:
    return BatchSource(groups, **{"batch_size": 4, "max_length": 128, "seed": 3} | options)


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=x.dtype != bool) for x, y in pairs)


def leaves(batch: Batch) -> list[np.ndarray]:
    return [getattr(batch, leaf) for leaf in LEAVES] + [batch.aux[name] for name in sorted(batch.aux)]


def numbers(batch: Batch) -> list[int]:
    """The group in every row, -1 for padding."""
    first = batch.tokens[..., 0, 0].ravel().tolist()
    real = (batch.segments[..., 0, 0] > 0).ravel().tolist()
    return [n if there else -1 for n, there in zip(first, real, strict=True)]


def test_pairs_lie_side_by_side():
    data = pairs()
    made = source(data, accumulation=2)
    batch = made.batch(1)
    assert batch.tokens.shape[:3] == (2, 2, 2)
    assert {leaf.dtype.name for leaf in leaves(batch)} == {"int32", "bool", "float32"}
    for row, number in enumerate(numbers(batch)):
        a, b = divmod(row, 2)
        for g, member in enumerate(data[number].members):
            size = len(member.tokens)
            assert batch.tokens[a, b, g, :size].tolist() == member.tokens.tolist()
            assert batch.mask[a, b, g, :size].tolist() == member.mask.tolist()
            assert not batch.mask[a, b, g, size:].any()
            assert batch.segments[a, b, g].tolist() == [1] * size + [0] * (batch.tokens.shape[-1] - size)
            assert batch.positions[a, b, g, :size].tolist() == list(range(size))
        assert np.array_equal(batch.aux["margin"][a, b], data[number].aux["margin"], equal_nan=True)
    assert made.ids(1) == [str(n) for n in numbers(batch)]


def test_one_epoch_shows_every_group_once():
    made = source(pairs(20))
    seen = [n for step in range(made.steps_per_epoch) for n in numbers(made.batch(step))]
    assert sorted(seen) == list(range(20))


def test_short_lists_are_filled_up_with_answers_that_hold_nothing():
    made = source(lists(), batch_size=6, group=0)
    batch = made.batch(0)
    assert made.group == batch.tokens.shape[2] == 4
    assert batch.aux["scores"].shape == (1, 6, 4)
    for row, number in enumerate(numbers(batch)):
        there = len(lists()[number].members)
        assert (batch.segments[0, row].max(axis=-1) > 0).tolist() == [g < there for g in range(4)]
        assert not batch.mask[0, row, there:].any()
        assert batch.aux["scores"][0, row, :there].tolist() == [-float(g) for g in range(there)]
        assert np.isnan(batch.aux["scores"][0, row, there:]).all()


def test_one_answer_of_a_labelled_row():
    batch = source(labels(), group=1).batch(0)
    assert batch.tokens.shape[2] == 1
    assert batch.aux["label"].dtype.name == "bool"
    assert batch.aux["label"].ravel().tolist() == [bool(n % 2) for n in numbers(batch)]


def test_the_mismatched_answer_is_that_of_the_row_before():
    data = labels()
    batch = source(data, batch_size=4, group=2).batch(1)
    order = numbers(batch)
    assert batch.tokens.shape[:3] == (1, 4, 2)
    for row, (before, number) in enumerate(pairwise([order[-1], *order])):
        own, other = (data[n].members[0] for n in (number, before))
        prompt, borrowed = own.tokens[~own.mask], other.tokens[other.mask]
        size = len(prompt) + len(borrowed)
        assert batch.tokens[0, row, 1, :size].tolist() == [*prompt, *borrowed]
        assert batch.mask[0, row, 1].sum() == len(borrowed)
        assert batch.segments[0, row, 1].sum() == size
        assert batch.mask[0, row, 0].sum() == own.mask.sum()


def test_mismatched_answers_are_cut_and_fit_their_bucket():
    longest = max(len(g.members[0].tokens) for g in labels())
    assert longest == 68  # prompts and answers of up to 50 and 66 tokens
    made = source(labels(), group=2, max_length=90)
    assert made.lengths[-1] == 128
    sizes = [made.batch(step).segments.sum(axis=-1).max() for step in range(12)]
    assert longest < max(sizes) <= 90
    assert source(labels(), group=1, max_length=90).stats == made.stats


def test_mismatched_answers_do_not_depend_on_the_processes():
    alone = source(labels(), group=2, batch_size=8)
    parts = [source(labels(), group=2, batch_size=8, process_index=p, process_count=4) for p in range(4)]
    for step in range(5):
        shares = [part.batch(step) for part in parts]
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *shares)
        assert same(joined, alone.batch(step))


@pytest.mark.parametrize("make", [pairs, lists, labels])
def test_processes_share_what_one_process_would_see(make):
    options = {"batch_size": 8, "accumulation": 2}
    alone = source(make(), **options)
    parts = [source(make(), **options, process_index=p, process_count=2) for p in range(2)]
    for step in range(6):
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(part.batch(step) for part in parts))
        assert same(joined, alone.batch(step))
    assert {part.fingerprint for part in parts} == {alone.fingerprint}


@pytest.mark.parametrize(("make", "group"), [(pairs, 2), (lists, 0), (labels, 1), (labels, 2)])
def test_abstract_batches_are_those_that_occur(make, group):
    made = source(make(), group=group, batch_size=2)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(batch)] for batch in made.abstract()]
    met = [[(x.shape, x.dtype) for x in jax.tree.leaves(made.batch(step))] for step in range(30)]
    assert all(found in shapes for found in met)
    structure = jax.tree.structure(made.batch(0))
    assert all(jax.tree.structure(batch) == structure for batch in made.abstract())
    widths = [batch.tokens.shape[-1] for batch in made.abstract()]
    assert widths == sorted(widths) == list(made.lengths)
    assert made.shapes == [batch.tokens.shape for batch in made.abstract()]


def test_abstract_batches_of_examples():
    examples = [Example(str(n), np.zeros(n, np.int32), np.arange(n) > 0) for n in range(2, 300, 9)]
    made = BatchSource(examples, batch_size=4, max_length=512, accumulation=2)
    assert [b.tokens.shape for b in made.abstract()] == [(2, 2, 1, w) for w in made.lengths]
    assert all(b.aux == {} for b in made.abstract())


def test_a_step_is_the_same_whatever_came_before():
    steps = [source(pairs()).batch(step) for step in range(8)]
    late = source(pairs())
    assert all(same(late.batch(step), steps[step]) for step in (7, 2, 5, 0))


def test_stats():
    data = pairs()
    made = source(data).stats
    tokens = sum(len(m.tokens) for g in data for m in g.members)
    targets = sum(int(m.mask.sum()) for g in data for m in g.members)
    assert (made.examples, made.rows, made.tokens, made.targets) == (21, 21, tokens, targets)
    rows = sum(64 * -(-max(len(m.tokens) for m in g.members) // 64) for g in data)
    assert made.pad_share == pytest.approx(1 - tokens / (2 * rows))


def test_fingerprint_changes_with_the_members_and_their_aux():
    data = pairs(3)
    base = source(data).fingerprint
    swapped = Group("0", data[0].members[::-1], data[0].aux)
    margin = Group("0", data[0].members, {"margin": np.float32(9)})
    for other in ([swapped, *data[1:]], [margin, *data[1:]], data[:2]):
        assert source(other).fingerprint != base
    assert source(pairs(3)).fingerprint == base


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"packing": True}, "answers that are compared stay apart"),
        ({"group": 1}, "row 0 has 2 answers, the method takes 1"),
        ({"max_length": 20}, "more than max_length=20"),
    ],
)
def test_groups_that_do_not_fit(options, cause):
    with pytest.raises(UserError, match=cause):
        source(pairs(), **options)


def test_a_lone_row_has_no_other_answer():
    with pytest.raises(UserError, match="batch_size=1 holds no other"):
        source(labels(), group=2, batch_size=1)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("make", "group"), [(pairs, 2), (lists, 0), (labels, 2)])
def test_evaluation_shows_everything_once(make, group, count):
    data = make()
    options = {"batch_size": 4, "max_length": 128, "group": group, "process_count": count}
    parts = [list(eval_batches(data, **options, process_index=p)) for p in range(count)]
    assert len({len(part) for part in parts}) == 1
    seen = [n for part in parts for batch in part for n in numbers(batch) if n >= 0]
    assert sorted(seen) == list(range(len(data)))
    last = parts[-1][-1]
    empty = [i for i, n in enumerate(numbers(last)) if n < 0]
    assert len(data) % 4 == 0 or empty
    for row in empty:
        assert not last.segments[row].any()
        assert not last.mask[row].any()
        assert all(not x[row].any() if x.dtype == bool else np.isnan(x[row]).all() for x in last.aux.values())


def test_a_last_row_that_is_alone_borrows_nothing():
    last = list(eval_batches(labels(9), batch_size=4, max_length=128, group=2))[-1]
    assert sum(n >= 0 for n in numbers(last)) == 1
    assert not last.segments[:, 1].any()
    assert last.mask[0, 0].any()


# --- prompts once -----------------------------------------------------------------------------------------

CASES = [(pairs, 2), (lists, 0), (labels, 2)]


def together(groups: list[Group], **options) -> BatchSource:
    return source(groups, share=True, **{"batch_size": 8} | options)


def held(batch: Batch) -> Shared:
    assert batch.shared is not None
    return batch.shared


def shape(batch: Batch) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), batch)


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize(("make", "group"), CASES)
def test_a_row_of_several_groups_holds_every_answer(make, group, blocks):
    made = together(make(), group=group, blocks=blocks, accumulation=1 if blocks == 8 else 2)
    plain = source(make(), group=group, batch_size=8, accumulation=made.accumulation)
    for step in range(4):
        batch, want = made.batch(step), plain.batch(step)
        shared, size = held(batch), min(batch.tokens.shape[-1], want.tokens.shape[-1])
        for leaf in LEAVES:  # what objectives see is what they would see without it
            assert np.array_equal(getattr(batch, leaf)[..., :size], getattr(want, leaf)[..., :size])
        a, n = shared.index.shape[0], blocks
        assert shared.tokens.shape[:2] == shared.index.shape[:2] == (a, n)
        where = shared.index.reshape(a, n, -1)
        for leaf in ("tokens", "positions"):
            rows = getattr(shared, leaf).reshape(a, n, -1)
            found = np.take_along_axis(rows, where, -1).reshape(batch.tokens.shape)
            assert np.array_equal(found[batch.segments > 0], getattr(batch, leaf)[batch.segments > 0])


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(("make", "group"), CASES)
def test_rows_of_groups_have_at_most_four_shapes_all_known_before(make, group, blocks):
    made = together(make(), group=group, blocks=blocks)
    shapes = [shape(batch) for batch in made.abstract()]
    met = [shape(made.batch(step)) for step in range(40)]
    assert len(shapes) <= 4
    assert all(found in shapes for found in met)
    assert max(shapes, key=lambda s: np.prod(s.shared.tokens[0])) == shapes[-1]
    assert made.layouts[-1] == (8 // blocks, made.lengths[-1])


def test_short_groups_go_together_and_long_ones_do_not():
    short, long = [(answer(i, 0, 9, 20), answer(i, 1, 9, 20)) for i in range(31)], (answer(9, 0, 9, 100),) * 2
    mixed = [Group(str(i), members) for i, members in enumerate([*short, long])]
    made = together(mixed)
    # The long one has 8 + 2 x 101 tokens, the others 8 + 2 x 21, of which five go into a row of 256.
    assert made.layouts == ((8, 64), (3, 256), (8, 256))
    alike = [Group(str(i), long) for i in range(32)]
    assert together(alike).layouts[-1] == (8, 256)
    each = tuple((1, length) for length in (64, 128, 192, 256))
    for one in (together(mixed, blocks=8), together(mixed).in_blocks(8)):
        assert one.layouts == each
    assert together(mixed, blocks=8).in_blocks(1).layouts == made.layouts
    assert together(mixed, apart=True).layouts == tuple((8, length) for _, length in each)
    assert made.fingerprint == source(mixed, batch_size=8).fingerprint


def test_padding_of_rows_of_groups_is_that_of_the_steps():
    for blocks in (1, 2, 8):
        made = together(pairs(), blocks=blocks)
        segments = [held(made.batch(step)).segments for step in range(made.steps_per_epoch)]
        real, computed = sum(int((s > 0).sum()) for s in segments), sum(s.size for s in segments)
        assert made.stats.pad_share == pytest.approx(1 - real / computed)


@pytest.mark.parametrize(("make", "group"), CASES)
def test_processes_lay_groups_out_as_one_would(make, group):
    options = {"accumulation": 2, "group": group, "blocks": 2}
    alone = together(make(), **options)
    parts = [together(make(), **options, process_index=p, process_count=2) for p in range(2)]
    for step in (3, 0, 1, 2):
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(part.batch(step) for part in parts))
        whole = alone.batch(step)
        assert same(joined, whole)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, joined.shared, whole.shared)))
    assert [shape(b) for b in parts[0].abstract()] == [shape(b) for b in parts[1].abstract()]


@pytest.mark.parametrize(("make", "group"), CASES)
def test_evaluation_in_rows_of_groups_shows_everything_once(make, group):
    data = make()
    batches = list(eval_batches(data, batch_size=8, max_length=128, group=group, share=True))
    seen = [n for batch in batches for n in numbers(batch) if n >= 0]
    assert sorted(seen) == list(range(len(data)))
    assert len({str(shape(batch)) for batch in batches}) <= 4


def test_blocks_that_do_not_divide():
    with pytest.raises(UserError, match="8 rows of a batch do not divide over 3 devices"):
        together(pairs(), blocks=3)
