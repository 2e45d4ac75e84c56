"""A small report's data for tests of the page. The numbers are made up."""

from __future__ import annotations

import copy
from typing import Any

from jaxalign.stats import paired_difference, rate_interval


def answer(text: str, passed: bool, fact: bool = False) -> dict[str, Any]:
    return {"text": text, "passed": passed, "failed": [] if passed else ["labels"], "fact": fact}


CASES = {
    "a-fixed": (False, True),
    "b-broke": (True, False),
    "c-failing": (False, False),
    "d-kept": (True, True),
}

_BEFORE, _AFTER = [a for a, _ in CASES.values()], [b for _, b in CASES.values()]
_DATA: dict[str, Any] = {
    "title": "A title",
    "summary": "One sentence.",
    "model": "a model",
    "created": "a day",
    "style": {
        "name": "a style",
        "about": "about it",
        "labels": ["Answer"],
        "example": "Answer: this.",
        "rules": {"labels": "what labels asks", "three_lines": "what three_lines asks"},
    },
    "measures": [
        {
            "name": "Kept the style",
            "about": "about the measure",
            "before": rate_interval(2, 4).to_json(),
            "after": rate_interval(2, 4).to_json(),
            "paired": paired_difference(_BEFORE, _AFTER).to_json(),
        }
    ],
    "preferences": {
        "about": "about preferences",
        "measures": [
            {
                "name": "Kept it briefly",
                "about": "about brevity",
                "before": rate_interval(1, 4).to_json(),
                "after": rate_interval(3, 4).to_json(),
                "paired": paired_difference(_BEFORE, _AFTER).to_json(),
            }
        ],
    },
    "items": [
        {
            "id": name,
            "topic": "science",
            "question": f"Question {name}?",
            "reference": "Answer: the reference.",
            "before": answer(f"old text of {name}", before),
            "after": answer(f"Answer: new text of {name}", after, fact=True),
            "preferred": answer(f"Answer: brief text of {name}", after, fact=True),
        }
        for name, (before, after) in CASES.items()
    ],
    "metrics": [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "tokens_per_sec": 100.0},
        {"step": 2, "eval_loss": 2.0},
        {"step": 3, "loss": 1.0, "learning_rate": 0.0, "tokens_per_sec": 110.0},
    ],
    "config": {"learning_rate": 1e-3, "lora": {"rank": 16, "targets": ["q", "k"]}, "max_steps": None},
    "versions": {"python": "3"},
    "machine": {"cores": 2},
    "phases": [{"name": "train", "seconds": 90.0}, {"name": "answer", "seconds": 30.0}],
    "commands": [{"about": "Talk", "command": "jaxalign chat -m run"}],
    "notes": ["a note"],
}


def sample() -> dict[str, Any]:
    """A fresh copy of the data."""
    return copy.deepcopy(_DATA)
