"""The logic of benchmarks/dpo.py: pairs as rows of steps, prompts encoded once, rows and their own peers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import batches, contest, dpo, flops, jax_dpo, pairs, prepare, stats, weights
from benchmarks.protocol import Contender
from benchmarks.session import Session

PRECISION = "bf16"


def some(rng: np.random.Generator, count: int, longest: int = 12) -> list[pairs.Pair]:
    sizes = rng.integers(1, longest, (count, 3))
    return [tuple(rng.integers(1, 99, n).astype(np.int32) for n in row) for row in sizes]


def test_pairs_lie_in_neighbouring_rows_and_come_back(tmp_path):
    given = some(np.random.default_rng(0), 12)
    batches.save(tmp_path / "p.npz", pairs.lay_out(given, steps=3))
    steps = batches.load(tmp_path / "p.npz")
    assert steps.tokens.shape[:2] == (3, 8)
    back = [pair for index in range(3) for pair in pairs.split(steps, index)]
    for got, want in zip(back, given, strict=True):
        assert [x.tolist() for x in got] == [x.tolist() for x in want]
    prompt, chosen, rejected = given[4]
    assert steps.trained(1) == sum(2 * len(p) + len(c) + len(r) for p, c, r in given[4:8])
    for row, answer in ((0, chosen), (1, rejected)):
        length = len(prompt) + len(answer)
        assert steps.tokens[1, row, :length].tolist() == [*prompt, *answer]
        assert np.flatnonzero(steps.mask[1, row]).tolist() == list(range(len(prompt), length))
        assert steps.segments[1, row].tolist() == [1] * length + [0] * (steps.tokens.shape[2] - length)
        assert steps.positions[1, row, :length].tolist() == list(range(length))


def test_fixed_pairs_share_their_prompt():
    steps = pairs.fixed(np.arange(1, 200), steps=2, pairs=3, prompt=8, answer=5)
    assert steps.tokens.shape == (2, 6, 13)
    assert steps.trained(0) == 6 * 13
    prompt, chosen, rejected = pairs.split(steps, 1)[2]
    assert prompt.tolist() == list(range(91, 99))
    assert chosen.tolist() == list(range(99, 104))
    assert rejected.tolist() == list(range(104, 109))
    with pytest.raises(ValueError, match="199 tokens, 216"):
        pairs.fixed(np.arange(199), steps=4, pairs=3, prompt=8, answer=5)


def test_real_pairs_are_whole_and_drawn_once():
    given = some(np.random.default_rng(1), 60)
    given[0] = (given[0][0], given[0][1], given[0][1][:0])  # an empty answer
    steps = pairs.real(given, steps=2, pairs=4, length=14, seed=3)
    drawn = [tuple(x.tobytes() for x in p) for i in range(2) for p in pairs.split(steps, i)]
    known = {tuple(x.tobytes() for x in p) for p in given[1:] if pairs.longest(p) <= 14}
    assert len(set(drawn)) == 8
    assert set(drawn) <= known
    again = pairs.real(given, steps=2, pairs=4, length=14, seed=4)
    assert again.tokens.shape != steps.tokens.shape or (again.tokens != steps.tokens).any()
    with pytest.raises(ValueError, match=rf"{len(known)} pairs fit into 14 tokens, 400"):
        pairs.real(given, steps=100, pairs=4, length=14, seed=3)


@pytest.mark.parametrize("share", [False, True])
def test_our_batch_has_chosen_before_rejected_in_few_widths(share):
    given = some(np.random.default_rng(2), 8, longest=90)
    steps = pairs.lay_out(given, steps=2)
    host = jax_dpo.hosts(jax_dpo.groups(steps), 2, share=share)
    for index in (0, 1, 2):  # steps start over
        batch = host(index)
        part = given[4 * (index % 2) : 4 * (index % 2) + 4]
        width = batch.tokens.shape[-1]
        assert batch.tokens.shape == (1, 4, 2, width)
        assert max(map(pairs.longest, part)) <= width
        assert width % 64 == 0
        assert (batch.shared is not None) == share
        for b, (prompt, *answers) in enumerate(part):
            for g, answer in enumerate(answers):
                row = (0, b, g)
                assert batch.tokens[row][batch.mask[row]].tolist() == answer.tolist()
                assert batch.tokens[row][: len(prompt)].tolist() == prompt.tolist()
                assert int((batch.segments[row] > 0).sum()) == len(prompt) + len(answer)
    assert host(0).tokens.tolist() == host(2).tokens.tolist()


def tokenizer() -> Any:
    """Letters as tokens, `<end>` after every turn, `<user>` and `<bot>` before."""
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .!?\n", 4)}
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "<user>": 2, "<bot>": 3} | letters, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    made.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return made


ROW = {
    "conversations": [{"from": "human", "value": "why?"}],
    "chosen": {"from": "gpt", "value": "because."},
    "rejected": {"from": "gpt", "value": "no"},
}


def text(rows: list[dict[str, Any]], tmp_path: Any) -> prepare.Text:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return prepare.Text(tokenizer(), str(path), vocabulary=40)


def test_the_prompt_of_a_pair_is_encoded_once(tmp_path):
    (pair,) = text([ROW], tmp_path).pairs(0, 0)
    words = [tokenizer().decode(ids) for ids in pair]
    assert [w.replace(" ", "") for w in words] == ["<user>why?<end>\n<bot>", "because.<end>", "no<end>"]
    assert prepare.turns(ROW)[1] == {"role": "assistant", "content": "because."}


def test_rows_without_two_answers_are_no_pairs(tmp_path):
    row = {k: v for k, v in ROW.items() if k != "rejected"}
    with pytest.raises(ValueError, match="`conversations`, `chosen` and `rejected`"):
        text([row], tmp_path).pairs(0, 0)
    assert len(text([row], tmp_path).examples(0, 0)) == 1  # fine-tuning can use it


def test_a_template_that_rewrites_prompts_is_refused(tmp_path):
    source = text([ROW], tmp_path)
    source.tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="differently"):
        source.pairs(0, 0)


def test_random_pairs_fit():
    found = prepare.Text(None, None, vocabulary=50).pairs(64, 20)
    assert len(found) == 20
    assert max(map(pairs.longest, found)) <= 64
    assert max(int(x.max()) for p in found for x in p) < 50


def contenders() -> list[Contender]:
    return dpo.contenders(SimpleNamespace(python="a", peer_python="b"), PRECISION)


def test_each_row_is_compared_with_ours_that_does_the_same():
    found = contenders()
    assert {c.rival for c in found} == {"", "TRL", "TRL precomputed", "TRL default"}
    for c in found:
        ready = bool(c.options.get("precomputed"))
        assert c.against == ("jaxalign precomputed" if ready else "jaxalign")
        assert dpo.cost(c) == ("precomputed" if ready else "in the step")
        assert bool(c.options.get("checkpointing")) == (c.rival == "TRL default")
    assert len([c for c in found if c.rival == "TRL precomputed"]) == 3


def chosen(*words: str) -> list[str]:
    session = Session(SimpleNamespace(only=list(words)))  # type: ignore[arg-type]
    return [c.name for c in session.chosen(contenders())]


def test_only_keeps_the_rows_of_ours_that_it_needs():
    assert chosen("default") == ["jaxalign", "TRL default (checkpointing)"]
    assert chosen("TRL precomputed, bf16 weights +") == [
        "jaxalign",
        "jaxalign precomputed",
        "TRL precomputed, bf16 weights + autocast",
    ]
    assert len(chosen()) == len(contenders())


def result(losses: dict[str, float]) -> dict[str, Any]:
    """What a contest of one round found; the n-th contender takes n seconds for its 100 tokens."""
    learned = {
        n: {"first": {"losses": [x], "wall_s": 4.0}, "warmup": {"losses": [x]}} for n, x in losses.items()
    }
    rounds = [
        {"contender": n, "wall_s": float(i), "cpu_s": 2.0 * i, "tokens": 100, "losses": [x],
         "peak_mib": 10.0, "load": 0.1, "loaded": False}
        for i, (n, x) in enumerate(losses.items(), 1)
    ]  # fmt: skip
    starts = {n: {"ready_s": 3.0, "compile_s": None} for n in losses}
    gaps = dict.fromkeys(losses, 0.0)
    return {"starts": starts, "learned": learned, "rounds": rounds, "gaps": gaps, "cold_compile_s": {}}


def test_rows_pair_with_their_own_and_count_their_own_work():
    names = ["jaxalign", "jaxalign precomputed", "TRL, bf16 weights", "TRL precomputed, bf16 weights"]
    who = [c for name in names for c in contenders() if c.name == name]
    label = {"data": "fixed-pairs", "precision": "f32", "threads": 2}
    found, work = result(dict.fromkeys(names, 0.8)), {"in the step": 6.0, "precomputed": 4.0}
    ours, before, trl, ready = dpo.table(found, who, label, work, {"flops": 600.0}, pairs=8)
    assert (ours["pairs/s"].median, ready["pairs/s"].median) == (8.0, 2.0)
    assert (trl["ours/this"].median, ready["ours/this"].median) == (3.0, 2.0)
    assert before["ours/this"].median == 1.0
    assert (ours["MFU%"], before["MFU%"]) == pytest.approx((100.0, 100 * 50 * 4 / 600))
    first, second = contest.headline(found, who, [ours, before, trl, ready])
    assert first.startswith("ours over TRL: 3 (3-3)")
    assert second.startswith("ours over TRL precomputed: 2 (2-2)")


def test_a_policy_that_is_its_reference_is_no_contest():
    dpo.check(result({"jaxalign": 0.8}))
    with pytest.raises(stats.DifferentWorkError, match="TRL compares the policy with itself"):
        dpo.check(result({"jaxalign": 0.8, "TRL": math.log(2)}))


def test_dpo_needs_a_forward_pass_more():
    shape = flops.Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True)
    a = 2 * 249 * 30 * 576
    assert shape.lora_train(249) + shape.forward(249) == 6 * 134_479_872 + 4 * a


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_the_adapter_starts_where_it_is_told(start, tmp_path):
    weights.random_model(tmp_path / "m", "tiny")
    weights.adapter(tmp_path / "a", tmp_path / "m", rank=4, alpha=8.0, start=start)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        largest = max(np.abs(file.get_tensor(n)).max() for n in file.keys() if "lora_B" in n)  # noqa: SIM118
    assert 0.95 * start <= largest <= start


def test_orders_name_prompt_and_answer():
    options = SimpleNamespace(
        variants=["fixed", "real"], warmup=2, steps=2, rounds=5, pairs=4, length=249, prompt=128,
        real_length=512,
    )  # fmt: skip
    fixed, real = dpo.orders(options)
    assert fixed["how"] == {"steps": 13, "pairs": 4, "prompt": 128, "answer": 121}
    assert real["how"] == {"steps": 13, "pairs": 4, "length": 512}
    assert {fixed["kind"], real["kind"]} <= prepare.ORDERS.keys()
