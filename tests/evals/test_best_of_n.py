"""The estimator against all subsets, and the evaluation: what is sampled, scored, left out and shown."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

import jaxalign
from jaxalign import api
from jaxalign.data.chat import load_tokenizer
from jaxalign.data.readers import read_records
from jaxalign.errors import UserError
from jaxalign.evals.best_of import best_of_kl, expected_best, sizes
from jaxalign.evals.best_of_n import lines
from jaxalign.models.source import resolve
from jaxalign.sampling import generate
from jaxalign.sampling.engine import Sample
from tests.pages.markup import Page
from tests.train.tiny import write_model

# ------------------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("rewards", [[3, -1, 7, 2, 2, 0, 5], [1, 0, 0, 1, 1], [4.5], [2, 2, 2]])
def test_the_estimate_is_the_mean_over_all_subsets(rewards: list[float]) -> None:
    for size in range(1, len(rewards) + 1):
        every = mean(max(subset) for subset in combinations(rewards, size))
        assert expected_best(rewards, size) == pytest.approx(every, rel=1e-14)


def test_it_holds_where_binomials_are_beyond_floating_point() -> None:
    """Of 1, ..., m the expected largest of N is N (m + 1) / (N + 1)."""
    for size in (1, 2, 512, 1024, 2048):
        assert expected_best(range(1, 2049), size) == pytest.approx(size * 2049 / (size + 1), rel=1e-12)


def test_it_is_without_bias() -> None:
    """Uniform rewards: the best of N is N / (N + 1) on average, from n = 8 answers as from N."""
    rows = np.random.default_rng(0).random((4000, 8))
    for size in sizes(8):
        values = [expected_best(row, size) for row in rows]
        assert np.mean(values) == pytest.approx(
            size / (size + 1), abs=4 * float(np.std(values)) / math.sqrt(4000)
        )


@pytest.mark.parametrize("size", [0, 4])
def test_the_best_of_more_answers_than_there_are_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be told from 3 answers"):
        expected_best([1, 2, 3], size)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])]
)
def test_sizes_double_up_to_n(n: int, expected: list[int]) -> None:
    assert sizes(n) == expected


@pytest.mark.parametrize("size", [1, 2, 4, 16, 100])
def test_the_kl_is_that_of_a_policy_without_ties(size: int) -> None:
    """The rank of an answer is uniform on [0, 1], that of the best of N has the density N u^(N-1)."""

    def integrand(u: float) -> float:
        return size * u ** (size - 1) * (math.log(size) + (size - 1) * math.log(u))

    found, error = quad(integrand, 0, 1)
    assert best_of_kl(size) == pytest.approx(found, abs=1e-6 + error)


@pytest.mark.parametrize("answers", [2, 10, 1000])
def test_the_kl_is_an_upper_bound(answers: int) -> None:
    """Against the exact distribution of the best of N of so many equally likely answers."""
    for size in (2, 8, 32):
        ends = (np.arange(answers + 1) / answers) ** size
        best = np.diff(ends)
        best = best[best > 0]
        exact = float((best * np.log(best * answers)).sum())
        assert exact < best_of_kl(size)
        if answers == 1000:
            assert exact == pytest.approx(best_of_kl(size), abs=0.02)


# ------------------------------------------------------------------------------------ the evaluation


class Echo:
    """Answers `LETTER NUMBER`, a function of prompt and seed; the last request first; dies after `limit`."""

    max_length = 64

    def __init__(self) -> None:
        self.limit, self.asked = 10**6, []

    def stream(self, prompts: Any, params: Any, watch: Any = None) -> Iterator[tuple[int, int, Sample]]:
        for request in reversed(range(len(prompts))):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append((tuple(prompts[request]), params[request].seed))
            rng = np.random.default_rng([params[request].seed, *prompts[request]])
            for number in range(params[request].n):
                letter = int(rng.integers(97, 123))
                ids, logp = np.array([letter, 257]), np.array([-3.0, -0.5], np.float32)
                finish = "length" if letter > 120 else "stop"
                yield request, number, Sample(ids, logp, logp, finish, f"{chr(letter)} {number}")


def early(completions: list[str], **_: Any) -> list[float | None]:
    """The earlier in the alphabet the better, from 0 to 1; q has no reward."""
    return [None if text[0] == "q" else (122 - ord(text[0])) / 25 for text in completions]


KEYS: dict[str, Any] = {"n": 8, "max_tokens": 4, "dtype": "f32", "rewards": {"early": early}}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("best-of-n")
    write_model(root / "model", sharpness=20.0)
    chat = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(24)]
    plain = [{"id": "text", "text": "Once"}, {"id": "long", "text": "long " * 60}]
    for name, rows in (("prompts.jsonl", chat), ("mixed.jsonl", [*chat[:8], *plain])):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        yield root


@pytest.fixture
def engine(here: Path, monkeypatch: pytest.MonkeyPatch) -> Echo:
    echo, tokenizer = Echo(), load_tokenizer(resolve(str(here / "model")))
    monkeypatch.setattr(generate, "load_engine", lambda model, config: (echo, tokenizer, "hash"))
    return echo


def go(here: Path, out: Path, data: str = "prompts.jsonl", **keys: Any) -> dict[str, Any]:
    model = keys.pop("model", str(here / "model"))
    return api.evaluate("best_of_n", model, str(here / data), out, **{**KEYS, **keys})


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_number_is_that_of_the_answers(here: Path, tmp_path: Path, engine: Echo) -> None:
    report = go(here, tmp_path, "mixed.jsonl")
    assert (report["prompts"], report["unanswered"], report["answers"]) == (9, 1, 72)
    assert json.loads((tmp_path / "result.json").read_text()) == report
    samples = read(tmp_path / "samples.jsonl")
    rewards: dict[str, list[float]] = {}
    for row in samples:
        assert row["rewards"] == {"early": row["reward"]}
        assert row["reward"] == early([row["text"]])[0]
        if row["reward"] is not None:
            rewards.setdefault(row["id"], []).append(row["reward"])
    assert len(samples) == 72
    assert report["unscored"] == sum(row["reward"] is None for row in samples) > 0
    assert report["cut"] == sum(row["finish"] == "length" for row in samples) > 0
    for point in report["points"]:
        known = [r for r in rewards.values() if len(r) >= point["N"]]
        expected = mean(mean(map(max, combinations(r, point["N"]))) for r in known)
        assert point["reward"]["n"] == len(known)
        assert point["reward"]["mean"] == pytest.approx(expected)
        assert point["reward"]["low"] <= point["reward"]["mean"] <= point["reward"]["high"]
    assert [point["N"] for point in report["points"]] == [1, 2, 4, 8]
    first, second, third = (point["reward"] for point in report["points"][:3])
    assert first["mean"] < second["mean"] < third["mean"]
    assert second["n"] == 9
    assert first["high"] - first["low"] > 0.02


def test_the_page_shows_what_is_left_out(here: Path, tmp_path: Path, engine: Echo) -> None:
    report = go(here, tmp_path, "mixed.jsonl")
    page = Page((tmp_path / "report.html").read_text())
    text, said = page.text(), "\n".join(lines(report))
    for part in (
        f"{report['unscored']} answers without a reward: rewards.early gave no number",
        "1 prompts are too long",
        f"{report['cut']} of 72 answers end at max_tokens",
        "Not every prompt has N answers with a reward: from N = 8 on",
    ):
        assert part in text
        assert part in said
    assert f"{report['points'][1]['reward']['mean']:.3f} (" in text
    marks = [attrs for tag, attrs in page.tags if tag == "text" and attrs.get("class") == "mark"]
    assert len(marks) == sum(point["reward"]["mean"] is not None for point in report["points"])


def test_the_best_answers_are_rows_that_sft_reads(here: Path, tmp_path: Path, engine: Echo) -> None:
    go(here, tmp_path, "mixed.jsonl")
    samples = [row for row in read(tmp_path / "samples.jsonl") if row["reward"] is not None]
    best = {row["id"]: row for row in read(tmp_path / "best.jsonl")}
    assert set(best) == {"text", *(f"r{i}" for i in range(8))}
    for name, row in best.items():
        mine = [s for s in samples if s["id"] == name]
        assert row["reward"] == max(s["reward"] for s in mine)
        assert row["n"] == len(mine)
        assert row["completion"] in [s["text"] for s in mine if s["reward"] == row["reward"]]
    records, report = read_records(tmp_path / "best.jsonl", max_bad_rows=0)
    assert report.formats == {"completion": 9}
    chat, plain = records[0], records[-1]
    assert chat.messages is not None
    assert [m.content for m in chat.messages] == ["Say 0.", best["r0"]["completion"]]
    assert chat.prompt_turns == 1
    assert (plain.prompt, plain.completion) == ("Once", best["text"]["completion"])


def test_a_killed_evaluation_samples_nothing_twice(here: Path, tmp_path: Path, engine: Echo) -> None:
    whole = go(here, tmp_path / "whole")
    asked = set(engine.asked)
    assert len(engine.asked) == 24
    engine.asked, engine.limit = [], 7
    with pytest.raises(KeyboardInterrupt):
        go(here, tmp_path / "out")
    (file,) = (tmp_path / "out" / "answers").glob("*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"id": "half writ')
    engine.limit = 10**6
    assert go(here, tmp_path / "out") == whole
    assert len(engine.asked) == len(set(engine.asked)) == 24
    assert set(engine.asked) == asked
    assert go(here, tmp_path / "out") == whole  # and once more, from the files alone
    assert len(engine.asked) == 24
    with pytest.raises(UserError, match="other settings: n 8 -> 4"):
        go(here, tmp_path / "out", n=4)


def other_base(model: Path, folder: Path) -> None:
    write_model(folder, seed=1)


def other_vocabulary(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|fill|>"))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|pad|>", "<|fill|>"))


def other_template(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>assistant", "<|im_start|>model"))


def other_stops(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 10]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_base, "it has another base"),
        (other_vocabulary, "it has another tokenizer"),
        (other_template, "writes a prompt otherwise than .*prompts.jsonl:1"),
        (other_stops, "its answers end at other tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_sampling(
    here: Path, tmp_path: Path, change: Any, said: str
) -> None:
    change(here / "model", tmp_path / "other")
    with pytest.raises(UserError, match=said) as caught:
        go(here, tmp_path / "out", compare=(str(tmp_path / "other"),))
    assert caught.value.place == f"compare: {tmp_path / 'other'}"
    assert str(here / "model") in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rewards": {}}, "nothing says which answers are good"),
        ({"n": 0}, "n: input should be greater than or equal to 1"),
        ({"compare_n": 0}, "compare_n: input should be greater than or equal to 1"),
        ({"temperature": 0}, "greater than 0"),
        ({"compare": "run"}, "expected a list such as"),
        ({"compare": ["nowhere"]}, "no model 'nowhere'"),
        ({"data": "none.jsonl"}, "no usable row"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    here: Path, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    (here / "none.jsonl").write_text("")
    with pytest.raises(UserError, match=said):
        go(here, tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_prompts_without_room_for_an_answer_are_an_error(here: Path, tmp_path: Path, engine: Echo) -> None:
    with pytest.raises(UserError, match="none of 24 prompts leaves room") as caught:
        go(here, tmp_path / "out", max_tokens=60)
    assert caught.value.place == "max_tokens"


# ------------------------------------------------------------------------------------ on a tiny model


def small(completions: list[str], **_: Any) -> list[float]:
    """A bandit: 1 for an answer that begins with a small letter."""
    return [float(text[:1].isascii() and text[:1].islower()) for text in completions]


@pytest.mark.slow
def test_a_tuned_policy_stands_beside_best_of_n(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "rloo"
    keys = {"max_tokens": 2, "max_length": 64, "max_steps": 40, "learning_rate": 3e-2, "warmup_ratio": 0.0}
    rewards = {"rewards": {"small": small}, "dtype": "f32"}
    jaxalign.train(
        "rloo", str(here / "model"), here / "prompts.jsonl", run, lora={"rank": 4}, **keys, **rewards
    )
    about = {**rewards, "n": 16, "max_tokens": 2, "compare_n": 4, "compare": (str(run),)}
    report = go(here, tmp_path / "out", **about)
    curve = [point["reward"]["mean"] for point in report["points"]]
    assert curve[0] < 0.5
    assert curve == sorted(curve)
    assert curve[-1] > curve[0] + 0.3
    (tuned,) = report["runs"]
    assert tuned["name"] == "rloo"
    assert tuned["reward"]["low"] > report["points"][0]["reward"]["high"]
    assert tuned["kl"]["low"] > 0.1
    assert "rloo" in (tmp_path / "out" / "report.html").read_text()
    ratios = [row["log_ratio"] for row in read(tmp_path / "out" / "samples.jsonl") if "log_ratio" in row]
    assert len(ratios) == 4 * 24
    assert mean(ratios) == pytest.approx(tuned["kl"]["mean"])
    assert go(here, tmp_path / "out", **about) == report  # nothing is sampled or measured twice

    itself = go(here, tmp_path / "self", **{**about, "model": str(run), "n": 4})
    assert itself["runs"][0]["kl"] == {"mean": 0.0, "n": 24, "low": 0.0, "high": 0.0}
    assert itself["runs"][0]["reward"] == itself["points"][0]["reward"]
