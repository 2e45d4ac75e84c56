"""What is asked once, what is asked again, and what becomes of the file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.llm.base import LLM, Completion, Likelihood, Question, Reply, Request, answers
from jaxalign.llm.cache import Cached
from jaxalign.llm.open import open_llm
from jaxalign.llm.settings import HttpConfig, LLMConfig
from tests.llm.fake_endpoint import echo, in_turn, refused


@dataclass
class Counting:
    """Answers with the number of the request; `closed` says whether a stream was ended early."""

    identity: str = "m"
    name: str = "counting"
    faults: tuple[str, ...] = ()
    asked: list[Request | Question] = field(default_factory=list)
    calls: int = 0
    closed: bool = False

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.calls += 1
        try:
            for index, request in reversed(list(enumerate(requests))):
                self.asked.append(request)
                text = Completion(f"no. {len(self.asked)} ü", "length", 3, -0.5)
                bad = request.prompt in self.faults
                yield index, Reply(fault="bad") if bad else Reply((text,) * request.n, 4)
        except GeneratorExit:
            self.closed = True
            raise

    def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
        self.calls += 1
        self.asked += questions
        return [
            "no idea" if q.prompt in self.faults else [Likelihood(-len(self.asked), 2) for _ in q.options]
            for q in questions
        ]


def cached(tmp_path: Path, llm: LLM | None = None) -> Cached:
    return Cached(llm or Counting(), tmp_path / "sub" / "cache.sqlite")


def test_what_is_kept_is_not_asked_again(tmp_path):
    first = Counting()
    requests = [Request(f"q{i}", n=2, seed=i) for i in range(5)]
    replies = answers(cached(tmp_path, first), requests)
    assert len(first.asked) == 5
    second = Counting()
    again = cached(tmp_path, second)
    assert answers(again, requests) == replies
    assert second.calls == 0
    assert (again.name, again.identity) == ("counting", "m")
    more = [Request("new"), *requests]
    order = [index for index, _ in again.stream(more)]
    assert order == [1, 2, 3, 4, 5, 0]  # what is kept comes first
    assert second.asked == [Request("new")]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"n": 2},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"max_tokens": 5},
        {"stop": ("x",)},
        {"prompt": (Message("user", "q"),)},
    ],
)
def test_every_part_of_a_request_counts(tmp_path, change):
    llm = Counting()
    request = Request("q")
    answers(cached(tmp_path, llm), [request, replace(request, **change)])
    assert len(llm.asked) == 2


def test_the_model_counts(tmp_path):
    llm = Counting("another")
    answers(cached(tmp_path), [Request("q")])
    answers(cached(tmp_path, llm), [Request("q")])
    assert len(llm.asked) == 1


def test_equal_requests_of_one_call_are_asked_once(tmp_path):
    llm = Counting()
    requests = [Request("q"), Request("r"), Request("q"), Request("q", seed=1)]
    replies = answers(cached(tmp_path, llm), requests)
    assert len(llm.asked) == 3
    assert replies[0] == replies[2]
    assert len({r.completions[0].text for r in replies}) == 3


def test_faults_are_asked_again(tmp_path):
    llm = Counting(faults=("q",))
    assert answers(cached(tmp_path, llm), [Request("q"), Request("r")])[0] == Reply(fault="bad")
    llm.faults = ()
    replies = answers(cached(tmp_path, llm), [Request("q"), Request("r")])
    assert [r.completions[0].text for r in replies] == ["no. 3 ü", "no. 1 ü"]
    assert llm.asked[2:] == [Request("q")]


def test_closing_early_keeps_what_came_and_closes_the_model(tmp_path):
    llm = Counting()
    stream = cached(tmp_path, llm).stream([Request(f"q{i}") for i in range(5)])
    assert next(stream)[0] == 4
    stream.close()  # type: ignore[attr-defined]
    assert llm.closed
    again = Counting()
    answers(cached(tmp_path, again), [Request("q4"), Request("q0")])
    assert again.asked == [Request("q0")]


def test_questions_are_kept_with_their_likelihoods(tmp_path):
    llm = Counting(faults=("bad",))
    questions = [Question("a", ("x", "y")), Question("bad", ("x",)), Question("a", ("x", "y"))]
    found = cached(tmp_path, llm).likelihoods(questions)
    assert found == [[Likelihood(-2, 2)] * 2, "no idea", [Likelihood(-2, 2)] * 2]
    assert len(llm.asked) == 2
    llm.faults = ()
    assert cached(tmp_path, llm).likelihoods(questions)[:2] == [found[0], [Likelihood(-3, 2)]]
    assert llm.asked[2:] == [questions[1]]


def test_questions_are_written_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxalign.llm.cache.ASKED_AT_ONCE", 4)

    class Breaking(Counting):
        def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
            if self.calls:
                raise UserError("down", status=75)
            return super().likelihoods(questions)

    questions = [Question(f"q{i}", ("x",)) for i in range(7)]
    with pytest.raises(UserError, match="down"):
        cached(tmp_path, Breaking()).likelihoods(questions)
    llm = Counting()
    cached(tmp_path, llm).likelihoods(questions)
    assert llm.asked == questions[4:]


WRITER = """
import sys
from pathlib import Path
from jaxalign.llm.base import Request, answers
from jaxalign.llm.cache import Cached
from jaxalign.llm.scripted import ScriptedLLM
llm = ScriptedLLM(lambda request, number, rng: f"{request.prompt} {request.seed}")
requests = [Request(f"q{i}", seed=i) for i in range(int(sys.argv[2]), int(sys.argv[3]))]
answers(Cached(llm, Path(sys.argv[1])), requests)
"""


def test_several_processes_share_a_file(tmp_path):
    file = tmp_path / "cache.sqlite"
    parts = [(0, 30), (15, 45), (0, 45)]
    command = [sys.executable, "-c", WRITER, str(file)]
    running = [subprocess.Popen([*command, str(a), str(b)], stderr=subprocess.PIPE) for a, b in parts]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    llm = Counting("script")
    replies = answers(Cached(llm, file), [Request(f"q{i}", seed=i) for i in range(45)])
    assert llm.calls == 0
    assert [r.completions[0].text for r in replies] == [f"q{i} {i}" for i in range(45)]


def _rubbish(file: Path) -> None:
    file.write_bytes(b"this is no database" * 100)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:6000])


def _wrong_value(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("""UPDATE answers SET value = '{"completions": 3'""")
        connection.commit()


def _wrong_form(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("""UPDATE answers SET value = '{"completions": [{"words": 3}]}'""")
        connection.commit()


@pytest.mark.parametrize("damage", [_rubbish, _cut, _wrong_value, _wrong_form])
def test_a_damaged_file_is_reported_with_its_remedy(tmp_path, damage):
    llm = cached(tmp_path)
    requests = [Request("q", seed=i) for i in range(8)]
    answers(llm, requests)
    damage(llm.file)
    with pytest.raises(UserError, match="the cache is damaged: ") as error:
        answers(llm, requests)
    assert (error.value.place, error.value.status) == (str(llm.file), 2)
    assert error.value.remedy.startswith("delete the file")


def test_a_file_that_cannot_be_written_is_no_damaged_one(tmp_path):
    (tmp_path / "sub").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="the cache cannot be used: ") as error:
        answers(cached(tmp_path), [Request("q")])
    assert "delete" not in error.value.remedy


def test_an_endpoint_is_opened_with_its_cache_and_its_key_is_not_in_it(tmp_path, server, monkeypatch):
    monkeypatch.setenv("JAXALIGN_API_KEY", "sk-planted-9f8e7d6c5b4a")
    server.script = in_turn([refused(400, "bad")], lambda call: echo(call))
    config = LLMConfig(http=HttpConfig(max_wait=0.01, concurrency=1))
    file = tmp_path / "cache.sqlite"
    requests = [Request("my key is sk-planted-9f8e7d6c5b4a", seed=i) for i in range(3)]
    first = answers(open_llm(server.name, config, file), requests)
    assert [r.fault for r in first] == ["400: bad", "", ""]
    assert first[1].completions[0].text == "my key is *** 1"
    second = answers(open_llm(server.name, config, file), requests)
    assert second[1:] == first[1:]
    assert len(server.calls) == 4
    assert b"9f8e" not in file.read_bytes()
    answers(open_llm(server.name, config), requests)
    assert len(server.calls) == 7
