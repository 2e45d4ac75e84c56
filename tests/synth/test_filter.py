import json
import random
import re

import pytest

from jaxalign.api import build
from jaxalign.config import load_config
from jaxalign.errors import UserError
from jaxalign.llm.scripted import ScriptedLLM
from jaxalign.synth.quality.dedup import near, near_by_hash
from jaxalign.synth.quality.settings import FilterConfig
from jaxalign.synth.quality.text import normal, sentence_grams, words
from tests.data.toy import shared
from tests.synth.quality_corpus import TEXTS, Filtered, corpus, row, write

PROMPT = "Tell me something about bread."


def repeats() -> dict[str, dict]:
    """Rows that repeat `bread`, from word for word to hardly, and two that only look like it."""
    text = TEXTS["bread"]
    return {
        "same": row("same", PROMPT, text),
        "case": row("case", PROMPT.upper(), f"  {text.replace(' ', '  ')}\n"),
        "word": row("word", PROMPT, text.replace("overnight", "until morning")),
        "moved": row("moved", PROMPT, ". ".join(reversed(text.split(". ")))),
        "other answer": row("other answer", PROMPT, TEXTS["ink"][::-1]),
        "half": row("half", PROMPT, text.split(". ")[0] + ". " + TEXTS["maps"].split(". ")[1]),
    }


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("exact", {"same", "case"}),
        ("ngram", {"same", "case", "word", "moved"}),
        ("minhash", {"same", "case", "word", "moved"}),
        ("[exact, ngram]", {"same", "case", "word", "moved"}),
    ],
)
def test_planted_repeats_are_found_and_only_they(tmp_path, kinds, found):
    rows = [*corpus(), *repeats().values()]
    done = Filtered(tmp_path, rows, overrides=[f"dedup={kinds}"])
    assert set(done.reasons) == found
    assert done.rows == [r for r in rows if r["id"] not in found]  # keys and order as they were
    assert all(r["detail"].startswith("as bread (") for r in done.dropped)
    assert sum(done.report["dropped"].values()) == len(found)


def test_the_prompt_alone_or_the_answer_alone_may_be_compared(tmp_path):
    rows = [*corpus(), *repeats().values(), row("asked otherwise", "How is a loaf made?", TEXTS["bread"])]
    of_prompts = Filtered(tmp_path, rows, "a", dedup="exact", dedup_of="prompt")
    assert set(of_prompts.reasons) == set(repeats())
    of_answers = Filtered(tmp_path, rows, "b", dedup="exact", dedup_of="answer")
    assert set(of_answers.reasons) == {"same", "case", "asked otherwise"}


def test_rows_that_contradict_each_other_are_not_repeats(tmp_path):
    good, bad = TEXTS["bread"], TEXTS["tides"]
    pair = {"prompt": PROMPT, "chosen": good, "rejected": bad}
    label = {"prompt": PROMPT, "completion": good}
    scores = {"prompt": PROMPT, "completions": [good, bad]}
    rows = [
        {"id": "pair", **pair},
        {"id": "turned", **pair, "chosen": bad, "rejected": good},
        {"id": "pair again", **pair},
        {"id": "wanted", **label, "label": True},
        {"id": "unwanted", **label, "label": False},
        {"id": "wanted again", **label, "label": True},
        {"id": "scored", **scores, "scores": [2, 1]},
        {"id": "scored otherwise", **scores, "scores": [1, 2]},
        {"id": "shuffled", "prompt": PROMPT, "completions": [bad, good], "scores": [1, 2]},
    ]
    for kind in ("exact", "ngram", "minhash"):
        found = Filtered(tmp_path, rows, kind, dedup=kind)
        assert set(found.reasons) == {"pair again", "wanted again", "shuffled"}, kind
        assert found.rows == [r for r in rows if r["id"] not in found.reasons]


def test_signs_tell_formulas_apart():
    assert sentence_grams("What is 2 + 2?", 3) != sentence_grams("What is 2 - 2?", 3)
    assert normal("x² + 1") != normal("x2 + 1")
    assert words("Don't SHOUT, 東京タワー") == ["don", "t", "shout", *"東京タワー"]
    assert sentence_grams("One two three. Four", 2) == {"one two", "two three", "four"}


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.8, 1.0])
def test_the_index_of_rare_ngrams_misses_no_pair(threshold):
    """Against the plain comparison of all pairs, on sets that overlap in every degree."""
    rng = random.Random(3)
    pool = [f"g{i}" for i in range(40)]
    sets = [set(rng.sample(pool, rng.randint(1, 30))) for _ in range(80)]
    sets += [set(sorted(s)[1:]) | {"x"} for s in sets[:40]] + [set(), set()]
    kept, expected = [], {}
    for i, one in enumerate(sets):
        like = [j for j in kept if one and len(one & sets[j]) / len(one | sets[j]) >= threshold]
        if like:
            expected[i] = like[0]
        else:
            kept.append(i)
    assert {i: j for i, (j, _) in near(sets, threshold).items()} == expected
    hashed = near_by_hash([lambda s=s: s for s in sets], threshold, permutations=256, seed=0)
    assert all(len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold for i, (j, _) in hashed.items())
    assert len(hashed) >= 0.9 * len(expected)


def test_lengths_are_counted_in_characters_and_words(tmp_path):
    rows = [
        row("short", "Hm?", "no"),
        row("fits", "What is it?", "a small round thing"),
        row("zh", "Hm? Hm?", "一二三四"),
    ]
    assert Filtered(tmp_path, rows, "a", answer_words=[4, None]).ids == ["fits", "zh"]
    assert Filtered(tmp_path, rows, "b", answer_chars=[3, 4]).ids == ["zh"]
    assert Filtered(tmp_path, rows, "c", prompt_words=[None, 1]).ids == ["short"]
    found = Filtered(tmp_path, rows, "d", prompt_chars=[4, 10], answer_words=[2, 4])
    assert found.reasons == {"short": "length: prompt_chars", "fits": "length: prompt_chars"}
    assert found.about("length")["answer_words"] == {
        "n": 3,
        "least": 1,
        "p5": 1.3,
        "median": 4,
        "p95": 4,
        "most": 4,
    }


def test_a_band_that_is_upside_down_is_refused():
    with pytest.raises(UserError, match=r"answer_words: the least \(9\) is more than the most \(2\)"):
        load_config(FilterConfig, overrides=["answer_words=[9, 2]"])


def test_languages_that_are_not_wanted_go(tmp_path):
    rows = [
        *corpus(),
        row(
            "de",
            "Was ist das hier?",
            "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter von gestern.",
        ),
        row("zh", "请介绍一下北京的历史。", "北京是中国的首都，有三千多年的历史，也是全国的政治和文化中心。"),
        row("code", "?", "for i in range(3): x[i] += 1"),
    ]
    found = Filtered(tmp_path, rows, "a", language="en")
    assert found.reasons == {"de": "language: de", "zh": "language: zh"}
    assert found.about("language")["texts"]["uncertain"] >= 2
    assert "de" not in Filtered(tmp_path, rows, "b", language=["en", "de"]).reasons
    answers = Filtered(tmp_path, [row("mixed", rows[-3]["messages"][1]["content"], TEXTS["ink"])], "c",
                       language="en", language_of="answer")  # fmt: skip
    assert answers.ids == ["mixed"]
    with pytest.raises(UserError, match="unknown language 'english'"):
        Filtered(tmp_path, rows, "d", language="english")


def test_what_stands_in_an_evaluation_set_goes(tmp_path):
    question = "How many of the twelve red boats in the old harbour were sold before the first winter storm?"
    sets = {
        "bench": [
            {"turns": [question, "Why do you think that?"], "category": "writing"},
            {"turns": ["Bake bread."]},
        ],
        "other": [{"instruction": "Name three rivers"}],
    }
    bench, other = (str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in sets.items())
    cut = " ".join(question.split()[:13])
    rows = [
        *corpus(),
        row("in the answer", "Make a riddle.", f"Here it comes: {cut.upper()}, roughly!"),
        row("twelve words", "Make a riddle.", " ".join(question.split()[:12])),
        row("prompt", "name three rivers ", "Rhine, Elbe, Oder"),
        row("turn", "Name three rivers in the north of the land", "Name three rivers"),
        row("category", "writing", "Writing is an art."),
    ]
    found = Filtered(tmp_path, rows, contamination=[bench, other])
    assert found.reasons == {"in the answer": f"contamination: {bench}", "prompt": f"contamination: {other}"}
    assert found.about("contamination")[bench] == {
        "rows_of_the_set": 2,
        "of_them_found": 1,
        "rows_with_an_ngram": 1,
        "rows_with_a_prompt": 0,
    }
    assert found.about("contamination")[other]["rows_with_a_prompt"] == 1
    assert "13" not in found.dropped[0]["detail"]
    assert cut.lower() in found.dropped[0]["detail"]
    with pytest.raises(UserError, match="it holds no texts"):
        Filtered(tmp_path, rows, "b", contamination=str(write(tmp_path / "no.jsonl", [{"n": 1}])))


def topics(counts: dict[str, int]) -> list[dict]:
    return [
        row(f"{t}{i}", f"Question {i} on {t}?", f"Answer {i}", topic=t)
        for t, n in counts.items()
        for i in range(n)
    ]


def test_balance_is_exact_and_drawn_by_the_seed(tmp_path):
    rows = [*topics({"art": 30, "law": 12, "sea": 7}), row("none", "What?", "That.")]
    found = Filtered(tmp_path, rows, "a", balance="topic")
    names = [r["meta"]["topic"] for r in found.rows]
    assert {t: names.count(t) for t in ("art", "law", "sea")} == {"art": 7, "law": 7, "sea": 7}
    assert found.report["dropped"] == {"balance: over the cap of topic": 28, "balance: no topic": 1}
    assert found.about("balance")["before"] == {"art": 30, "law": 12, "sea": 7}
    capped = Filtered(tmp_path, rows, "b", balance="topic", balance_cap=10)
    assert capped.about("balance")["after"] == {"art": 10, "law": 10, "sea": 7}
    assert set(found.ids) < set(capped.ids)  # the lot of a row does not hang on the cap
    assert Filtered(tmp_path, rows, "c", balance="topic", seed=1).ids != found.ids
    assert Filtered(tmp_path, rows[::-1], "d", balance="topic").ids == found.ids[::-1]
    with pytest.raises(UserError, match="no row has 'topics'; did you mean 'topic'"):
        Filtered(tmp_path, rows, "e", balance="topics")


def surprise(prompt, option: str) -> float:
    """Nats: three a word; a word that the prompt has costs a tenth of that."""
    known = set() if isinstance(prompt, str) else set(" ".join(m.content for m in prompt).split())
    return -sum(0.3 if word in known else 3.0 for word in option.split())


def scorer() -> ScriptedLLM:
    return ScriptedLLM(lambda *_: "", surprise)


def test_ifd_and_perplexity_are_ratios_of_the_scorers_nll(tmp_path):
    rows = [
        row("copy", "red green blue black", "red green blue black"),  # IFD 0.1, NLL 0.3
        row("half", "red green", "red green blue black"),  # IFD 0.55, NLL 1.65
        row("none", "Name colours", "red green blue black"),  # IFD 1, NLL 3
    ]
    found = Filtered(tmp_path, rows, "a", model=scorer(), ifd=[0.5, 0.9])
    assert found.ids == ["half"]
    assert found.about("likelihood")["ifd"]["median"] == pytest.approx(0.55)
    details = {r["id"]: float(r["detail"]) for r in found.dropped}
    assert details == {"copy": pytest.approx(0.1), "none": pytest.approx(1.0)}
    assert Filtered(tmp_path, rows, "b", model=scorer(), perplexity=[None, 6]).ids == [
        "copy",
        "half",
    ]  # e^1.65 = 5.2
    assert set(found.report["stages"]) == {"given", "alone"}


def test_every_answer_must_lie_in_the_band_and_a_text_has_no_ifd(tmp_path):
    rows = [
        {"id": "pair", "prompt": "red green", "chosen": "red green", "rejected": "big old house"},
        {"id": "fine", "prompt": "red green", "chosen": "red green", "rejected": "green red"},
        {"id": "text", "text": "red green"},
    ]
    model = ScriptedLLM(lambda *_: "", lambda p, o: -sum(0.3 if w in p.split() else 3.0 for w in o.split()))
    found = Filtered(tmp_path, rows, model=model, ifd=[0.0, 0.5])
    assert found.reasons == {"pair": "ifd: outside its band", "text": "ifd: not told"}


def test_a_model_is_needed_only_where_a_key_asks_for_one(tmp_path):
    assert Filtered(tmp_path, corpus(), "a", dedup="exact").report["models"] == {}
    with pytest.raises(UserError, match="-m MODEL: no model is named"):
        Filtered(tmp_path, corpus(), "b", ifd=[0, 1])
    data = write(tmp_path / "rows.jsonl", corpus())
    report = build("filter", None, data, tmp_path / "c.jsonl", models={"scorer": scorer()}, ifd=[0, 2])
    assert report["models"] == {"scorer": {"name": "script", "identity": "script"}}


def test_filters_come_in_one_order_and_are_counted_one_after_the_other(tmp_path):
    rows = [*topics({"art": 4, "sea": 2}), row("x", "Hm?", "", topic="sea"), *topics({"art": 1})]
    rows[-1]["id"] = "again"
    found = Filtered(tmp_path, rows, balance="topic", dedup="exact", answer_chars=[1, 100], max_bad_rows=0.5)
    about = found.report["metrics"]["filters"]
    assert list(about) == ["length", "exact", "balance"]
    assert [about[name]["in"] for name in about] == [7, 7, 6]
    assert found.report["n_in"] == 8
    assert found.report["dropped"] == {
        "unreadable: empty assistant turn": 1,
        "repeated: exact": 1,
        "balance: over the cap of topic": 2,
    }
    assert found.report["n_out"] + sum(found.report["dropped"].values()) == 8


def test_nothing_switched_on_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no filter is switched on"):
        Filtered(tmp_path, corpus())


def test_published_rows_keep_their_form(tmp_path):
    """Trees, safety pairs and transcripts are rows too: what passes is what was read."""
    row_of = {
        "pku": {
            "prompt": "Say hello",
            "response_0": "hello to you",
            "response_1": "no",
            "better_response_id": 0,
            "safer_response_id": 1,
            "is_response_0_safe": True,
            "is_response_1_safe": True,
        },
        "hh": {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
        "alpaca": {"instruction": "Count", "input": "to two", "output": "one two"},
    }
    rows = [*row_of.values(), *row_of.values()]
    found = Filtered(tmp_path, rows, dedup="exact")
    assert found.rows == rows[:3]
    assert [r["row"] for r in found.dropped] == rows[3:]


def test_real_pairs_with_planted_repeats(tmp_path):
    file = shared("llama-factory/dpo_en_demo.json")
    if file is None:
        pytest.skip("shared data is not here")
    rows = json.loads(file.read_text(encoding="utf-8"))[:100]
    once = Filtered(tmp_path, rows, "once", dedup="ngram")
    rows = [dict(r, id=f"r{i}") for i, r in enumerate(once.rows)]
    planted = [dict(r, id=f"copy of {r['id']}") for r in rows[::7]]
    found = Filtered(tmp_path, rows + planted, "twice", dedup=["ngram"])
    assert set(found.reasons) == {r["id"] for r in planted}
    hashed = Filtered(tmp_path, rows + planted, "hashed", dedup="minhash")
    assert set(hashed.reasons) == {r["id"] for r in planted}
    assert re.search(r"as r\d+ ", hashed.dropped[0]["detail"])
