"""Rows whose faults were planted by hand, and a short way to run the filter over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.api import build

TEXTS = {
    "bread": "Mix flour, water, salt and yeast, let the dough rest overnight. Then fold it twice, shape "
    "a loaf and bake it in a hot oven until the crust is dark and sounds hollow when you knock "
    "on it.",
    "tides": "The moon pulls the water on the near side of the earth a little more than on the far side. "
    "So two bulges form, and as the earth turns below them most coasts see two high tides a "
    "day.",
    "knots": "A bowline makes a fixed loop at the end of a rope. Form a small eye, pass the end up "
    "through it, around the standing part and back down, then pull it tight; it will not slip "
    "under load.",
    "maps": "A map with a large scale shows a small area in much detail. Walkers like a scale of one to "
    "twenty five thousand, while drivers are content with one that shows a whole country on a "
    "sheet.",
    "bees": "Bees tell each other where flowers are by a dance. The angle of the run is the angle to "
    "the sun, and its length says how far the food is; the others follow and fly there on their "
    "own.",
    "ink": "Iron gall ink was made from oak galls and iron salt. It goes on pale and darkens as it "
    "meets the air, and it bites into parchment so firmly that most medieval manuscripts were "
    "written with it.",
}


def row(name: str, prompt: str, answer: str, **meta: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns, "meta": meta}


def corpus(**meta: Any) -> list[dict[str, Any]]:
    return [row(name, f"Tell me something about {name}.", text, **meta) for name, text in TEXTS.items()]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Filtered:
    """What `jaxalign build filter` made of `rows`."""

    def __init__(self, folder: Path, rows: Sequence[Any], name: str = "clean", **keys: Any) -> None:
        model = keys.pop("model", None)
        data = write(folder / "rows.jsonl", rows)
        out = folder / f"{name}.jsonl"
        self.folder = folder / f"{name}.build"
        self.report = build("filter", model, data, out, **keys)
        self.rows = read(out)
        self.dropped = read(self.folder / "dropped.jsonl")

    @property
    def ids(self) -> list[str]:
        return [r["id"] for r in self.rows]

    @property
    def reasons(self) -> dict[str, str]:
        return {r["id"]: r["reason"] for r in self.dropped}

    def about(self, name: str) -> dict[str, Any]:
        return self.report["metrics"]["filters"][name]
