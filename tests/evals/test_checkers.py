import pytest

from jaxalign.evals.checkers import RULES, check_card, names_fact, shared_words, words

GOOD = (
    "Answer: Ice is less dense than water, so it floats.\n"
    "Because: Freezing locks molecules into an open pattern that takes up more room.\n"
    "Check: Mark the level in a plastic cup, freeze it, and compare."
)
ANSWER, BECAUSE, CHECK = GOOD.split("\n")


def card(answer: str = ANSWER, because: str = BECAUSE, check: str = CHECK) -> str:
    return "\n".join([answer, because, check])


def test_a_good_answer_passes():
    assert check_card(GOOD) == (True, [])


@pytest.mark.parametrize("text", [f"\n{GOOD}\n", GOOD.replace("\n", "\r\n"), GOOD.replace("\n", "  \n")])
def test_white_space_around_lines_does_not_count(text: str):
    assert check_card(text).passed


SHAPE = {
    "empty": "",
    "white space": " \n\t\n",
    "one line": GOOD.replace("\n", " "),
    "two lines": f"{ANSWER}\n{BECAUSE}",
    "a fourth line": f"{GOOD}\nI hope this helps!",
    "a line before": f"Sure, here it is.\n{GOOD}",
    "blank lines between": GOOD.replace("\n", "\n\n"),
    "twice": f"{GOOD}\n{GOOD}",
    "in a code block": f"```\n{GOOD}\n```",
}


@pytest.mark.parametrize("text", SHAPE.values(), ids=SHAPE.keys())
def test_another_number_of_lines_fails(text: str):
    assert "three_lines" in check_card(text).failed


LABELS = {
    "wrong label": card(because=BECAUSE.replace("Because", "Reason")),
    "lower case": card(answer=ANSWER.replace("Answer", "answer")),
    "wrong order": card(ANSWER, CHECK, BECAUSE),
    "label twice": card(ANSWER, ANSWER, CHECK),
    "bold label": card(answer=ANSWER.replace("Answer:", "**Answer:**")),
    "no space": card(answer=ANSWER.replace(": ", ":")),
    "two spaces": card(answer=ANSWER.replace(": ", ":  ")),
    "indented": card(because=f"  {BECAUSE}"),
    "list": card(f"- {ANSWER}", f"- {BECAUSE}", f"- {CHECK}"),
    "label alone": card(check="Check:"),
}


@pytest.mark.parametrize("text", LABELS.values(), ids=LABELS.keys())
def test_other_labels_fail(text: str):
    assert check_card(text) == (False, ["labels"])


CONTENT = {
    "two sentences": ("one_sentence", card(answer="Answer: Ice floats. It is less dense.")),
    "question inside": ("one_sentence", card(answer="Answer: Does ice float? It does so always.")),
    "exclamation mark": ("one_sentence", card(check="Check: Look at the ice in a glass!")),
    "no full stop": ("one_sentence", card(check="Check: Look at the ice in a glass")),
    "three dots": ("one_sentence", card(check="Check: Look at the ice in a glass...")),
    "ellipsis": ("one_sentence", card(check="Check: Look at the ice in a glass….")),
    "small letter": ("one_sentence", card(answer="Answer: ice is less dense than water.")),
    "no space between": ("one_sentence", card(answer="Answer: Ice floats on water.It is light.")),
    "quoted end": ("one_sentence", card(answer='Answer: Some say "ice is light." Others do not.')),
    "space before the stop": ("one_sentence", card(answer="Answer: Ice is less dense than water .")),
    "too short": ("word_limits", card(answer="Answer: It floats.")),
    "too long": ("word_limits", card(because="Because: " + "word " * 22 + "Word.".lower())),
    "no action": ("action", card(check="Check: The ice in a glass is easy to see.")),
    "marked words": ("plain_text", card(answer="Answer: Ice is *less* dense than water.")),
    "code": ("plain_text", card(check="Check: Type `ls` in a terminal and look.")),
    "link": ("plain_text", card(check="Check: Read https://example.org about ice.")),
    "numbered": ("plain_text", card(answer="Answer: 1. Ice is less dense than water.")),
    "the reason repeats the answer": ("no_repetition", card(because=BECAUSE[:9] + ANSWER[8:])),
    "the check repeats it in part": (
        "no_repetition",
        card(check="Check: See that ice is less dense than water and so it floats."),
    ),
}


@pytest.mark.parametrize(("rule", "text"), CONTENT.values(), ids=CONTENT.keys())
def test_each_rule_is_applied(rule: str, text: str):
    verdict = check_card(text)
    assert not verdict.passed
    assert rule in verdict.failed


def test_several_broken_rules_are_named_in_the_order_of_the_table():
    verdict = check_card(card(answer="Answer: *ice*!", check="Check: The glass."))
    assert verdict.failed == ["one_sentence", "word_limits", "action", "plain_text"]
    assert set(verdict.failed) < set(RULES)


@pytest.mark.parametrize(
    "answer",
    [
        "Answer: A Celsius degree is 1.8 times larger than the other.",
        "Answer: It holds 86,400 seconds and O'Brien's well-known clock.",
        'Answer: "Ciao" is Italian for hello among friends.',
        "Answer: 12 is the square root of 144.",
    ],
)
def test_points_that_end_no_sentence_are_allowed(answer: str):
    assert check_card(card(answer=answer)).passed


def test_limits_are_inclusive():
    def line(n: int) -> str:
        return card(answer=f"Answer: {' '.join(['Ab', *('x' * i for i in range(1, n))])}.")

    assert check_card(line(3)).passed
    assert check_card(line(18)).passed
    assert check_card(line(2)).failed == ["word_limits"]
    assert check_card(line(19)).failed == ["word_limits"]


def test_words_and_shared_words():
    assert words("It's 86,400 well-known — words.") == ["it's", "86,400", "well-known", "words"]
    assert shared_words("one two three four", "Four three five.") == pytest.approx(2 / 3)
    assert shared_words("", "word") == 0.0


def test_key_facts_are_found_at_the_start_of_a_word():
    assert names_fact("It is AU, of course", [r"Au\b"])
    assert not names_fact("Australia", [r"Au\b"])
    assert names_fact("The displaced water", ["displac"])
    assert not names_fact("a plunge into the sea", ["lung", "ice|sea lion"])
    assert names_fact("a fridge", ["cold water", "fridge"])
    assert not names_fact("anything", [])


@pytest.mark.parametrize(
    "text", ["Oxygen does. Nitrogen is rare.", "Answer: Oxygen\nCheck: nitrogen", "Oxygen!\nNitrogen"]
)
def test_a_key_fact_counts_in_the_first_sentence_only(text: str):
    assert names_fact(text, ["oxygen"])
    assert not names_fact(text, ["nitrogen"])
    assert names_fact("\n It is about 3.14 metres", ["3.14 metres"])
