import json

import pytest

from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Question, Reply, Request
from jaxalign.llm.scripted import ScriptedLLM
from jaxalign.synth.stage import Ask, Choose, Rules, Stage
from tests.marker_world import format_breaking

ITEMS = 40


def digit(completions):
    text = completions[0].text
    return (int(text), "") if text.isdigit() else (None, "no digit")


def seven(request, number, rng):
    return "7"


def items(count=ITEMS, **how):
    return [Ask(f"i{n}", Request(f"question {n}", **how), digit) for n in range(count)]


def files(folder):
    return [(folder / name).read_bytes() for name in ("rate.jsonl", "rate.rejects.jsonl")]


def test_what_is_not_understood_is_asked_again_with_other_seeds(tmp_path):
    llm = ScriptedLLM(format_breaking(seven, 0.5))
    outcome = Stage("rate", tmp_path, llm, Rules(retries=20)).ask(items())
    assert outcome.values == {f"i{n}": 7 for n in range(ITEMS)}
    assert outcome.attempts == len(llm.asked) > ITEMS
    assert outcome.failures == outcome.attempts - ITEMS
    assert outcome.tokens == outcome.attempts  # every answer is one word
    assert outcome.prompt_tokens == 2 * outcome.attempts
    assert len({r.seed for r in llm.asked}) == len(llm.asked)


def test_a_greedy_request_is_repeated_with_some_temperature(tmp_path):
    llm = ScriptedLLM(format_breaking(seven, 0.5))
    Stage("rate", tmp_path, llm, Rules(retries=20, retry_temperature=0.3)).ask(items(temperature=0.0))
    first, again = llm.asked[:ITEMS], llm.asked[ITEMS:]
    assert {r.temperature for r in first} == {0.0}
    assert again
    assert {r.temperature for r in again} == {0.3}


def test_what_is_never_understood_is_set_aside_with_its_raw_answers(tmp_path):
    def script(request, number, rng):
        return "seven" if request.prompt == "question 3" else "7"

    outcome = Stage("rate", tmp_path, ScriptedLLM(script), Rules(retries=2)).ask(items())
    assert "i3" not in outcome.values
    assert outcome.rejects == {"no digit": 1}
    assert (outcome.failures, outcome.attempts) == (3, ITEMS + 2)
    (row,) = map(json.loads, files(tmp_path)[1].splitlines())
    assert (row["id"], row["attempts"], row["raw"]) == ("i3", 3, ["seven"])


def test_too_many_failures_end_the_stage_and_stay_on_disk(tmp_path):
    llm = ScriptedLLM(format_breaking(seven, 0.5))
    stage = Stage("rate", tmp_path, llm, Rules(retries=0, max_parse_fail=0.2))
    with pytest.raises(UserError, match=r"stage rate: 9 of 40 items.*\(9 x no digit\)"):
        stage.ask(items())
    asked = len(llm.asked)
    with pytest.raises(UserError, match="9 of 40"):  # nor does the same command go on from there
        stage.ask(items())
    assert len(llm.asked) == asked
    lenient = Stage("rate", tmp_path, llm, Rules(retries=0, max_parse_fail=0.9)).ask(items())
    assert len(lenient.values) + sum(lenient.rejects.values()) == ITEMS


class Dies(ScriptedLLM):
    """Stops in the middle of its work, as a killed program does."""

    def __init__(self, script, after):
        super().__init__(script)
        self.left = after

    def stream(self, requests):
        for found in super().stream(requests):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield found


@pytest.mark.parametrize("after", [0, 1, 17, 39, 45, 60])
def test_a_killed_stage_goes_on_and_ends_alike(after, tmp_path):
    script, rules = format_breaking(seven, 0.5), Rules(retries=20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wanted = Stage("rate", whole, ScriptedLLM(script), rules).ask(items())
    with pytest.raises(KeyboardInterrupt):
        Stage("rate", killed, Dies(script, after), rules).ask(items())
    with (killed / "rate.jsonl").open("a") as file:
        file.write('{"id": "i5", "va')  # a line that was being written
    done = {json.loads(line)["id"] for line in files(killed)[0].splitlines()[:-1]}
    llm = ScriptedLLM(script)
    assert Stage("rate", killed, llm, rules).ask(items()) == wanted
    assert files(killed) == files(whole)
    assert done.isdisjoint({"i" + str(r.prompt).split()[1] for r in llm.asked})


def test_an_answer_does_not_depend_on_the_company(tmp_path):
    script = format_breaking(lambda request, number, rng: str(rng.integers(1000)), 0.3)
    alone = Stage("rate", tmp_path / "a", ScriptedLLM(script)).ask(items()[7:8])
    together = Stage("rate", tmp_path / "b", ScriptedLLM(script)).ask(items())
    assert alone.values["i7"] == together.values["i7"]
    other = Stage("rate", tmp_path / "c", ScriptedLLM(script), Rules(seed=1)).ask(items())
    assert other.values != together.values


class Refuses(ScriptedLLM):
    def stream(self, requests):
        for index, request in enumerate(requests):
            self.asked.append(request)
            bad = request.prompt == "question 2"
            yield index, Reply(fault="too long") if bad else Reply((Completion("7", tokens=1),), 2)


def test_a_fault_of_the_backend_is_not_asked_again(tmp_path):
    llm = Refuses(seven)
    outcome = Stage("rate", tmp_path, llm).ask(items())
    assert outcome.rejects == {"too long": 1}
    assert len(llm.asked) == ITEMS


def test_choices_are_normalised_over_the_options_and_kept(tmp_path):
    llm = ScriptedLLM(seven, scorer=lambda prompt, option: {"A": 1.2, "B": 0.2}[option])
    stage, wanted = Stage("label", tmp_path, llm), [Choose("x", Question("which", ("A", "B")))]
    a, b = stage.choose(wanted).values["x"]
    assert b == pytest.approx(-1.3132617)  # log softmax(1.2, 0.2)[1]
    assert a == pytest.approx(-0.3132617)
    silent = Stage("label", tmp_path, ScriptedLLM(seven))
    assert silent.choose(wanted).values["x"] == [a, b]  # from the file
    with pytest.raises(UserError, match="no scorer"):
        Stage("other", tmp_path, ScriptedLLM(seven)).choose(wanted)


def test_two_items_of_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'i0'"):
        Stage("rate", tmp_path, ScriptedLLM(seven)).ask(items(1) * 2)
