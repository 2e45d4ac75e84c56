"""The attacks of the registry's `ATTACKS`, and those that a user brings as files.

An entry is a function from `Setup` to `Attack`. What it says stands in `templates/redteam/NAME.txt`; the
wording that comes with the package is harmless and serves to test the machinery: it asks for a token.
Families as named in RED-EVAL (arXiv:2308.09662) and github.com/BinFuPKU/LLM-Alignment.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxalign.data.records import Message
from jaxalign.errors import UserError, nearest
from jaxalign.registry import ATTACKS
from jaxalign.synth.redteam.base import (
    Attack,
    AttackKeys,
    Case,
    Decoding,
    Setup,
    Tried,
    Tries,
    Try,
    Turns,
    once,
)
from jaxalign.synth.templates import Template, Templates

PLACEHOLDER = "<question>"  # in files that others published, which are no templates
LEET = str.maketrans("aeiostAEIOST", "431057431057")
SCHEMES: dict[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "leet": lambda text: text.translate(LEET),
}


def wrapped(setup: Setup) -> Attack:
    """The template around the question, in as many turns as it has."""
    return Attack(setup.name, _filled(setup.wording[setup.name]))


def with_canary(setup: Setup) -> Attack:
    """The same, where success is that the answer shows the canary: goal hijacking, prompt leaking."""
    return Attack(setup.name, _filled(setup.wording[setup.name]), canary=True)


def _filled(template: Template) -> Tries:
    return once(lambda case, rng: template.messages(question=case.question, canary=case.canary))


def few_shot_context(setup: Setup) -> Attack:
    """The first `examples` of the template's exchanges before the question. Raises `UserError` where the
    template has fewer."""
    template = setup.wording[setup.name]
    known = (len(template.messages(question="?")) - 1) // 2
    if setup.keys.examples > known:
        raise UserError(
            f"{setup.keys.examples} examples are asked for and the template has {known}",
            place=template.place,
            remedy="write more of them there, or lower examples",
        )

    def apply(case: Case, rng: np.random.Generator) -> Turns:
        turns = template.messages(question=case.question)
        return (*turns[: 2 * setup.keys.examples], turns[-1])

    return Attack(setup.name, once(apply))


def decode_sweep(setup: Setup) -> Attack:
    """The question under every pair of a temperature and a top_p."""
    keys = setup.keys
    grid = [Decoding(t, p) for t in keys.sweep_temperature for p in keys.sweep_top_p]
    template = setup.wording[setup.name]
    return Attack(setup.name, once(lambda case, rng: template.messages(question=case.question), grid))


def translate(setup: Setup) -> Attack:
    """The question in another language; a helper translates, there and back."""
    template = setup.wording[setup.name]
    return Attack(
        setup.name,
        once(lambda case, rng: template.messages(question=case.question, translated=case.prepared)),
        prepare="translate_there",
        restore="translate_back",
        values={"language": setup.keys.language},
    )


def encode(setup: Setup) -> Attack:
    """The question in base64, and in leet spelling."""
    template = setup.wording[setup.name]

    def tries(case: Case, past: Sequence[Tried], rng: np.random.Generator) -> Sequence[Try]:
        if past:
            return ()
        return [
            Try(template.messages(question=case.question, scheme=name, encoded=code(case.question)), name)
            for name, code in SCHEMES.items()
        ]

    return Attack(setup.name, tries)


def multi_turn_split(setup: Setup) -> Attack:
    """The question in pieces, a turn each; the last answer counts."""
    template = setup.wording[setup.name]

    def apply(case: Case, rng: np.random.Generator) -> Turns:
        pieces = split(case.question, setup.keys.pieces)
        return template.messages(question=case.question, pieces=pieces)

    return Attack(setup.name, once(apply))


def split(text: str, count: int) -> list[str]:
    """At most `count` pieces of about as many words each; text without spaces is cut between characters."""
    words = text.split()
    glue, units = (" ", words) if len(words) > 1 else ("", list(text.strip()))
    parts = np.array_split(np.arange(len(units)), min(count, len(units)))
    return [glue.join(units[i] for i in part) for part in parts]


# ------------------------------------------------------------------------------------------- a user's own


def open_attacks(names: Iterable[str], wording: Templates, keys: AttackKeys) -> list[Attack]:
    """Attacks by registry name, or by path: a file, or a folder of them. Raises `UserError`."""
    found: dict[str, Attack] = {}
    for name in names:
        for attack in _open(name, wording, keys):
            if attack.name in found:
                raise UserError(f"two attacks are called {attack.name!r}", place=f"attacks: {name}")
            found[attack.name] = attack
    if not found:
        raise UserError("no attack is named", place="attacks", remedy=f"known: {', '.join(ATTACKS)}")
    return list(found.values())


def _open(name: str, wording: Templates, keys: AttackKeys) -> list[Attack]:
    if name in ATTACKS:
        return [ATTACKS[name](Setup(name, wording, keys))]
    path = Path(name).expanduser()
    if not path.exists():
        remedy = f"known: {', '.join(ATTACKS)}; or a file NAME.txt, or a folder of them"
        raise UserError(f"unknown attack {name!r}{nearest(name, ATTACKS)}", place="attacks", remedy=remedy)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError("no file NAME.txt is in it", place=f"attacks: {name}", remedy="put one there")
    return [_own(file, wording) for file in files]


def _own(file: Path, wording: Templates) -> Attack:
    """The attack of one file: a template with a slot for the question, or a text with `<question>` in it."""
    template = Template(file.read_text(encoding="utf-8"), str(file))
    wording.used[file.stem] = template.sha256
    if PLACEHOLDER in template.source:
        text = template.source.strip()
        return Attack(
            file.stem, once(lambda case, rng: (Message("user", text.replace(PLACEHOLDER, case.question)),))
        )
    if "question" not in template.slots:
        remedy = f"write {{{{ question }}}} or {PLACEHOLDER} where it belongs"
        raise UserError("the file has no place for the question", place=str(file), remedy=remedy)
    return Attack(file.stem, _filled(template), canary="canary" in template.slots)


def slots_of(template: Template) -> dict[str, list[str]]:
    """{slot: its options} of a file of lines `slot: option`, `#` begins a remark. Raises `UserError`."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(template.source.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"\s*(\w+)\s*:(.*)", line)
        if match is None:
            raise UserError("not a line `slot: option`", place=f"{template.place}:{number}")
        found.setdefault(match[1], []).append(match[2].strip())
    return found
