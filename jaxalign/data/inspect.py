"""`jaxalign inspect data`: what a model would see of the rows, what it would learn, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.batching import BatchSource, bucket_lengths
from jaxalign.data.chat import Tokenizer
from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.preferences import GroupRecord
from jaxalign.data.readers import LoadReport, kind_of, read_groups, read_records
from jaxalign.data.records import SFTRecord
from jaxalign.data.rows import Item, members_of, prompt_length
from jaxalign.data.spans import LossOn
from jaxalign.data.tokenize import Truncation, tokenize, tokenize_groups
from jaxalign.types import Example, Group

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

TOKENS_SHOWN = 400  # of one row
STEP = 8  # groups: the default of `batch_size` on up to eight devices
BAR = 40  # columns of the longest histogram bar

# kind of token -> (rich style of even tokens, of odd tokens)
STYLES = {
    "learned": ("green", "bright_green"),
    "context": ("bright_black", "white"),
    "special": ("cyan", "bright_cyan"),
    "stop": ("bold black on green", "bold black on green"),
}

KEY = "learned: green; a learned stop token: black on green; special: cyan; the rest is context"
PLAIN_KEY = "+ is learned, - is context"


@dataclass(frozen=True)
class Token:
    """One token to show: its text, and whether it is learned, context, special or a learned stop token."""

    text: str
    kind: str

    @property
    def learned(self) -> bool:
        """Whether it is a target."""
        return self.kind in ("learned", "stop")


def show_tokens(example: Example, tokenizer: Tokenizer, limit: int = TOKENS_SHOWN) -> list[Token]:
    """The first `limit` tokens, each with the text it adds (a character of several goes to the last)."""
    ids, special = example.tokens[:limit].tolist(), tokenizer.special_ids
    out, before = [], ""
    for i, (token, learned) in enumerate(zip(ids, example.mask, strict=False)):
        text = tokenizer.decode(ids[: i + 1], special=True)
        whole = before if text.endswith("\ufffd") else text
        kind = "learned" if learned else "special" if token in special else "context"
        kind = "stop" if learned and token in tokenizer.stop_tokens else kind
        out.append(Token(whole[len(before) :], kind))
        before = whole
    return out


def rich_tokens(tokens: Sequence[Token]) -> Text:
    """The tokens coloured by kind, neighbours in two shades; line breaks are shown and kept."""
    from rich.text import Text

    out = Text()
    for i, token in enumerate(tokens):
        out.append(token.text.replace("\n", "⏎\n"), style=STYLES[token.kind][i % 2])
    return out


def plain_tokens(tokens: Sequence[Token]) -> list[str]:
    """The same without colour: a line for every run, led by + where it is learned and - where it is not."""
    runs: list[tuple[bool, str]] = []
    for token in tokens:
        if runs and runs[-1][0] == token.learned:
            runs[-1] = (token.learned, runs[-1][1] + token.text)
        else:
            runs.append((token.learned, token.text))
    return [f"{'+' if learned else '-'} {text!r}" for learned, text in runs]


def histogram(lengths: np.ndarray, edges: Sequence[int]) -> list[str]:
    """One line for every range of lengths that ends at an edge: the range, a bar, the count."""
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    top, low, out = max(int(counts.max()), 1), 1, []
    for edge, count in zip(edges, counts.tolist(), strict=True):
        bar = "#" * max(round(BAR * count / top), 1 if count else 0)
        out.append(f"{low:>6}-{edge:<6} {bar:<{BAR}} {count}")
        low = edge + 1
    return out


def packing_lines(items: Sequence[Item], max_length: int) -> list[str]:
    """Rows and share of padding: for examples with and without packing, for groups apart and as training lays
    out steps of the usual size on one device."""
    packed: dict[str, dict[str, Any]] = {"one example a row": {}, "packed": {"packing": True}}
    grouped: dict[str, dict[str, Any]] = {"one answer a row": {}}
    if max(len(members_of(item)) for item in items) > 1:
        grouped[f"prompts once, in steps of {STEP}"] = {"share": True, "batch_size": STEP}
    out = []
    for name, how in (grouped if isinstance(items[0], Group) else packed).items():
        options: dict[str, Any] = {"batch_size": 1} | how
        source = BatchSource(items, max_length=max_length, **options)
        stats, lengths = source.stats, ", ".join(map(str, source.lengths))
        rows = f"{stats.rows} groups" if "share" in how else f"{stats.rows * source.group} rows"
        out.append(f"{name}: {rows}, {stats.pad_share:.1%} padding, row lengths {lengths}")
    return out


def say(out: Console, lines: Sequence[str], title: str = "") -> None:
    """Print lines as they are, under a bold title."""
    if title:
        out.print(f"\n{title}", style="bold", markup=False, highlight=False, soft_wrap=True)
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def say_row(out: Console, example: Example, tokenizer: Tokenizer) -> None:
    """Print one example token by token."""
    total, learned = len(example.tokens), int(example.mask.sum())
    say(out, [], f"Row {example.id}: {total} tokens, {learned} learned")
    say_tokens(out, example, tokenizer)


def say_tokens(out: Console, example: Example, tokenizer: Tokenizer, first: int = 0) -> None:
    """Print the tokens of an example from the token `first` on."""
    cut = Example(example.id, example.tokens[first:], example.mask[first:])
    tokens = show_tokens(cut, tokenizer)
    if out.is_terminal:
        out.print(rich_tokens(tokens))
    else:
        say(out, plain_tokens(tokens))
    if len(cut.tokens) > TOKENS_SHOWN:
        say(out, [f"... {len(cut.tokens) - TOKENS_SHOWN} more tokens"])


def say_group(out: Console, group: Group, tokenizer: Tokenizer) -> None:
    """Print the prompt of a group once, then each answer under its name and its score, label or margin."""
    stem = min(prompt_length(m) for m in group.members)
    first = group.members[0]
    say(out, [], f"Row {group.id}: a prompt of {stem} tokens, {len(group.members)} answer(s)")
    say_tokens(out, Example(first.id, first.tokens[:stem], first.mask[:stem]), tokenizer)
    for member, title in zip(group.members, titles(group), strict=True):
        size, learned = len(member.tokens) - stem, int(member.mask.sum())
        say(out, [], f"{title}: {size} tokens, {learned} learned")
        say_tokens(out, member, tokenizer, stem)


def titles(group: Group) -> list[str]:
    """What to call each answer of a group."""
    if "label" in group.aux:
        return ["wanted" if group.aux["label"] else "unwanted"]
    if "scores" in group.aux:
        return [f"score {score:g}" for score in group.aux["scores"].tolist()]
    margin = float(group.aux["margin"])
    return ["chosen" if math.isnan(margin) else f"chosen, margin {margin:g}", "rejected"]


def inspect_data(
    records: Sequence[SFTRecord] | Sequence[GroupRecord],
    report: LoadReport,
    tokenizer: Tokenizer,
    *,
    max_length: int = 1024,
    truncation: Truncation = "keep_start",
    loss_on: LossOn | None = None,
    rows: int = 3,
    console: Console | None = None,
) -> None:
    """Print what was read and left out, the first `rows` rows token by token, lengths and packing.

    Records to imitate are shown one by one, answers that are compared or judged under their prompt. Coloured
    on a terminal, plain text elsewhere. Raises `UserError` as `tokenize` and `tokenize_groups` do.
    """
    from rich.console import Console

    out = console or Console()
    say(out, report.lines(), "Rows")
    alone = [r for r in records if isinstance(r, SFTRecord)]
    compared = [r for r in records if not isinstance(r, SFTRecord)]
    if alone:
        items, counted = tokenize(alone, tokenizer, max_length, truncation, loss_on)
    else:
        items, counted = tokenize_groups(compared, tokenizer, max_length, truncation)
    choice = f"max_length {max_length}, truncation {truncation}, loss_on {loss_on or 'by row form'}"
    stops = ", ".join(f"{tokenizer.decode([i], special=True)!r} ({i})" for i in tokenizer.stop_tokens)
    key = KEY if out.is_terminal else PLAIN_KEY
    say(out, [*counted.lines(), f"stop tokens: {stops}", key], f"Tokens ({choice})")
    for item in items[:rows]:
        say_group(out, item, tokenizer) if isinstance(item, Group) else say_row(out, item, tokenizer)
    lengths = np.asarray([len(e.tokens) for item in items for e in members_of(item)])
    say(out, histogram(lengths, bucket_lengths(int(lengths.max()), 8)), "Lengths in tokens")
    say(out, packing_lines(items, max_length), "Rows of a batch")


def inspect_files(
    data: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    kind: str | None = None,
    options: GroupOptions | None = None,
    max_bad_rows: float = 0.1,
    **shown: Any,
) -> None:
    """`inspect_data` of files, read as `kind`: sft, pairs, binary or lists; None: what the first row is."""
    chosen = kind or kind_of(data)
    if chosen == "sft":
        records, report = read_records(data, max_bad_rows=max_bad_rows)
    else:
        records, report = read_groups(data, chosen, options=options, max_bad_rows=max_bad_rows)
    inspect_data(records, report, tokenizer, **shown)
