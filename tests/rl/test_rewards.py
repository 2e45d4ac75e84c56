"""Rewards: what each kind gives, how they add up, and what becomes of answers that cannot be scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.config import load_config
from jaxalign.data.records import Message, Prompt
from jaxalign.errors import UserError
from jaxalign.registry import REWARDS
from jaxalign.rl.rewards import Answer, Faults, RewardsConfig, build_rewards


def answers(*texts: str, **row: Any) -> list[Answer]:
    asked = (Message("user", "How many?"),)
    return [Answer(Prompt(f"p{i}", asked, None, row), text) for i, text in enumerate(texts)]


def values(kind: str, given: Sequence[Answer], **keys: Any) -> list[float | None]:
    return list(REWARDS[kind].model_validate(keys)(given))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"most": 4}, [1.0, 1.0, 0.5, 0.0]),  # 0, 2, 6 and 9 words
        ({"least": 4}, [0.0, 0.5, 1.0, 1.0]),
        ({"least": 4, "most": 6}, [0.0, 0.5, 1.0, 0.5]),
    ],
)
def test_length_counts_words(keys, expected):
    texts = ("", "two words", "one two three four five six", "a b c d e f g h i")
    assert values("length", answers(*texts), **keys) == expected


def test_regex_is_found_or_must_match_the_whole():
    given = answers("It is 12.", " 12\n", "none")
    assert values("regex", given, pattern=r"\d+") == [1, 1, 0]
    assert values("regex", given, pattern=r"\d+", whole=True) == [0, 1, 0]


def test_exact_compares_with_the_row_and_extracts_the_last_place():
    given = answers("So 3 + 9 = 12", "The answer is TWELVE .", "12. ", answer=12)
    assert values("exact", given) == [0, 0, 1]
    assert values("exact", given, extract=r"\d+") == [1, 0, 1]
    assert values("exact", given, extract=r"= (\d+)") == [1, 0, 0]
    assert values("exact", given, key="missing") == [None, None, None]


def test_json_must_be_valid_by_the_schema(tmp_path: Path):
    pytest.importorskip("jsonschema", reason="the extra `rewards` is not installed")
    given = answers('{"n": 1}', '```json\n{"n": "x"}\n```', "[1]", "{")
    assert values("json_schema", given) == [1, 1, 0, 0]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert values("json_schema", given, schema_file=str(tmp_path / "s.json")) == [1, 0, 0, 0]


def test_sentiment_knows_good_from_bad():
    pytest.importorskip("textblob", reason="the extra `rewards` is not installed")
    good, bad, flat = values(
        "sentiment", answers("A wonderful, happy day.", "A terrible, sad day.", "A day.")
    )
    assert good is not None
    assert bad is not None
    assert good > 0.3
    assert bad < -0.3
    assert flat == 0


def brief(completions: list[str], prompts: list[str], **columns: list[Any]) -> list[float | None]:
    assert prompts == ["How many?"] * len(completions)
    if "crash" in completions:
        raise ValueError("no")
    return [None if text == "none" else -float(len(text)) for text in completions]


def total(rewards: dict[str, Any], given: Sequence[Answer], **keys: Any) -> tuple[Any, Faults]:
    faults = Faults()
    return build_rewards(RewardsConfig(rewards=rewards, **keys))(given, faults), faults


def test_parts_add_up_by_weight_and_cut_answers_lose_the_penalty():
    given = [*answers("four"), Answer(answers("x")[0].prompt, "four", "length")]
    rewards = {"brief": brief, "short": {"kind": "length", "most": 1, "weight": 2}}
    found, faults = total(rewards, given, missing_eos_penalty=0.5)
    assert found.total.tolist() == [-2.0, -2.5]
    assert {k: v.tolist() for k, v in found.parts.items()} == {"brief": [-4, -4], "short": [1, 1]}
    assert not faults.counts


def test_what_cannot_be_scored_has_no_reward_and_is_counted():
    found, faults = total({"brief": brief}, answers("ab", "none", "crash", "crash"))
    assert found.total[0] == -2
    assert np.isnan(found.total[1:]).all()
    assert faults.lines() == [
        "1 answers without a reward: rewards.brief gave no number",
        "2 answers without a reward: rewards.brief raised ValueError, first on row p2",
    ]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda completions, **_: [1.0], "1 values for 2 answers"),
        (lambda completions, **_: ["good", "bad"], "gave str in place of a number"),
        (lambda completions, **_: 1 / 0, "raises ZeroDivisionError: division by zero on every answer"),
    ],
)
def test_a_function_that_does_not_keep_to_the_contract_is_refused(function, said):
    with pytest.raises(UserError, match=said):
        total({"mine": function}, answers("a", "b"))


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ({}, "nothing says which answers are good"),
        ({"lenght": {"most": 3}}, "did you mean 'length'"),
        ({"length": {"least": -1}}, "rewards.length.least"),
        ({"polite": {"kind": "regex", "pattern": "("}}, "rewards.polite.pattern"),
        ({"mine": {"kind": "python", "function": "nowhere:f"}}, "cannot be imported"),
        ({"mine": {"kind": "python", "function": "math"}}, "is not module:function"),
    ],
)
def test_rewards_that_cannot_be_are_refused(rewards, said):
    with pytest.raises(UserError, match=said):
        build_rewards(RewardsConfig(rewards=rewards))


def test_keys_come_from_the_command_line_and_functions_have_names():
    config = load_config(RewardsConfig, overrides=["rewards.length.most=3", "rewards.length.weight=0.5"])
    assert build_rewards(config)(answers("a b c"), Faults()).total.tolist() == [0.5]
    named = RewardsConfig(rewards={"brief": brief}).model_dump(mode="json")
    assert named["rewards"]["brief"]["function"].endswith("test_rewards:brief")
    assert math.isclose(build_rewards(RewardsConfig(**named))(answers("ab"), Faults()).total[0], -2)


def test_rewards_are_normalised_by_the_answers_of_the_start(tmp_path: Path):
    """Mean 0 and deviation 1 over those; later answers by the same moments, kept in the file. A reward that
    is the same for all answers only loses its mean."""
    blocks = {
        "words": {"kind": "length", "least": 4, "weight": 2.0},
        "same": {"kind": "regex", "pattern": "."},
    }
    config = load_config(RewardsConfig, values={"rewards": blocks, "normalise": True})
    rewards, file = build_rewards(config), tmp_path / "sub" / "moments.json"
    first = rewards(answers("a", "a b", "a b c", "a b c d"), Faults(), file)
    assert first.total.mean() == pytest.approx(0.0, abs=1e-12)
    assert first.total.std() == pytest.approx(2.0)
    words = first.parts["words"]
    later = rewards(answers("a b c d"), Faults(), file)
    assert later.total[0] == pytest.approx(2 * (1.0 - words.mean()) / words.std())
    assert later.parts["words"][0] == 1.0
    plain = build_rewards(load_config(RewardsConfig, values={"rewards": blocks}))
    assert plain(answers("a b c d"), Faults(), file).total[0] == 3.0


def test_rewards_are_clipped_before_the_penalty():
    blocks = {"words": {"kind": "length", "least": 2, "weight": 10.0}}
    keys = {"rewards": blocks, "clip_reward": 4.0, "missing_eos_penalty": 1.0}
    given = [*answers("a b", "a"), Answer(answers("a b")[0].prompt, "a b", "length")]
    found = build_rewards(load_config(RewardsConfig, values=keys))(given, Faults())
    assert found.total.tolist() == [4.0, 4.0, 3.0]
