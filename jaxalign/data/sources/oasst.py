"""OpenAssistant conversations (arXiv:2304.07327): trees of messages, whose answers people have ranked.

A row is a tree (`message_tree_id`, `prompt`), the root message of one, or one message of a flat table, which
`joined` puts together again. Extraction follows OpenAssistant's own: threads with a deleted or a synthetic
message are left out, and so are trees that are not ready for export or whose prompt failed review.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from jaxalign.data.files import Rows
from jaxalign.data.preferences import ScoredRecord, Turns, scored_record
from jaxalign.data.records import ROLE_NAMES, Message, RowError, SFTRecord, UnwantedRowError, chat_record

Node = dict[str, Any]
Path = tuple[Node, ...]  # from the root on

_UNWANTED = "a deleted or synthetic message in the thread"


def is_tree(row: Node) -> bool:
    """Whether the row is a tree, or the root of one with its replies."""
    return ("message_tree_id" in row and isinstance(row.get("prompt"), dict)) or _is_root(row)


def _is_root(row: Node) -> bool:
    return "message_id" in row and row.get("role") == "prompter" and isinstance(row.get("replies"), list)


def _is_message(row: Any) -> bool:
    return isinstance(row, dict) and {"message_id", "parent_id", "text", "role"} <= row.keys()


def joined(rows: Rows) -> Rows:
    """The rows, those of a flat table of messages put together to trees at the end."""
    flat: list[tuple[str, Node]] = []
    for place, row in rows:
        if _is_message(row) and "replies" not in row:
            flat.append((place, row | {"replies": []}))
        else:
            yield place, row
    nodes = {row["message_id"]: row for _, row in flat}
    roots = []
    for place, row in flat:
        if row["parent_id"] is None:
            roots.append((place, row))
        elif row["parent_id"] in nodes:
            nodes[row["parent_id"]]["replies"].append(row)
        else:
            yield place, RowError("a message whose parent is missing")
    yield from roots


def paths(tree: Node) -> Iterator[Path]:
    """Every message with all that precede it, depth first."""
    stack: list[Path] = [(tree.get("prompt", tree),)]
    while stack:
        path = stack.pop()
        yield path
        stack += [(*path, reply) for reply in reversed(path[-1].get("replies") or [])]


def _check_tree(tree: Node) -> None:
    """Raise `UnwantedRowError` for a tree that OpenAssistant would not export."""
    root = tree.get("prompt", tree)
    state = tree.get("tree_state", "ready_for_export")
    if state != "ready_for_export":
        raise UnwantedRowError(f"the tree is {state}")
    if root.get("review_result") is False:
        raise UnwantedRowError("the prompt failed review")


def _kept(path: Path) -> bool:
    return not any(node.get("deleted") or node.get("synthetic") for node in path)


def turns(path: Path) -> Turns:
    """The messages of a thread. Raises `RowError` for an unknown role."""
    for node in path:
        if node.get("role") not in ROLE_NAMES or not isinstance(node.get("text"), str):
            raise RowError(f"a message without text, or of unknown role {node.get('role')!r}")
    return tuple(Message(ROLE_NAMES[node["role"]], node["text"]) for node in path)


def _about(path: Path, fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields of a record made of this thread."""
    root = path[0]
    meta = fields.get("meta", {}) | {"id": name, "lang": root.get("lang"), "tree": root.get("message_id")}
    return fields | {"meta": meta}


def from_tree(tree: Node, **fields: Any) -> list[ScoredRecord | RowError | UnwantedRowError]:
    """A list of answers for every message with two or more ranked ones; the score is minus the rank."""
    _check_tree(tree)
    out: list[ScoredRecord | RowError | UnwantedRowError] = []
    for path in paths(tree):
        replies = path[-1].get("replies") or []
        ranked = [r for r in replies if r.get("role") == "assistant" and r.get("rank") is not None]
        kept = [r for r in ranked if _kept((r,))] if _kept(path) else []
        if path[-1].get("role") != "prompter" or len(ranked) < 2:
            continue
        if len(kept) < 2:
            out.append(UnwantedRowError(_UNWANTED))
            continue
        try:
            answers = [turns((reply,)) for reply in kept]
            about = _about(path, fields, str(path[-1].get("message_id")))
            family = str(path[0].get("message_id"))
            scores = [-float(reply["rank"]) for reply in kept]
            out.append(scored_record(turns(path), answers, scores, family=family, **about))
        except RowError as reason:
            out.append(reason)
    return out


def sft_from_tree(
    tree: Node, *, top_k: int | None = None, **fields: Any
) -> list[SFTRecord | RowError | UnwantedRowError]:
    """The thread to every leaf. One that ends on a prompt loses it; of such siblings only the first counts.

    `top_k` leaves out threads with an answer ranked `top_k` or worse, or unranked beside others.
    """
    _check_tree(tree)
    out: list[SFTRecord | RowError | UnwantedRowError] = []
    for path in paths(tree):
        if path[-1].get("replies"):
            continue
        if not _kept(path):
            out.append(UnwantedRowError(_UNWANTED))
            continue
        if path[-1].get("role") == "prompter":
            if len(path) < 2 or path[-2]["replies"][0] is not path[-1]:
                continue
            path = path[:-1]
        if top_k is not None and not _among_best(path, top_k):
            out.append(UnwantedRowError(f"an answer is not among the best {top_k}"))
            continue
        try:
            out.append(chat_record(turns(path), **_about(path, fields, str(path[-1].get("message_id")))))
        except RowError as reason:
            out.append(reason)
    return out


def _among_best(path: Path, top_k: int) -> bool:
    for before, node in pairwise(path):
        if node.get("role") == "assistant":
            rank = node.get("rank")
            if len(before["replies"]) > 1 if rank is None else rank >= top_k:
                return False
    return True


def prompts_from_tree(tree: Node) -> list[tuple[str, Turns]]:
    """(message id, thread) of every message that an assistant is to answer."""
    _check_tree(tree)
    return [
        (str(path[-1].get("message_id")), turns(path))
        for path in paths(tree)
        if path[-1].get("role") == "prompter" and _kept(path)
    ]
