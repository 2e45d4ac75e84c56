"""Prompts as files: `templates/SYSTEM/NAME.txt`, jinja2 with named slots, in turns.

A line `[system]`, `[user]` or `[assistant]` begins a turn; a file without such a line is one text.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from jaxalign.data.records import Message
from jaxalign.errors import UserError

SHIPPED = Path(__file__).parent / "templates"
_TURN = re.compile(r"^\[(system|user|assistant)\]$", re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """One prompt. `place` is its file, for messages to the user."""

    source: str
    place: str

    @property
    def sha256(self) -> str:
        """The first 16 hex digits of its hash."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @cached_property
    def slots(self) -> frozenset[str]:
        """The names it has a place for. Raises `UserError` where the file is not a template."""
        from jinja2 import TemplateSyntaxError, meta

        try:
            return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))
        except TemplateSyntaxError as error:
            where = f"{self.place}:{error.lineno}"
            raise UserError(
                f"not a template ({error.message})", place=where, remedy="mend the line"
            ) from error

    def text(self, **values: Any) -> str:
        """The whole file with its slots filled. Raises `UserError` for a slot that has no value."""
        return self._filled(self.source, values)

    def messages(self, **values: Any) -> tuple[Message, ...]:
        """Its turns with their slots filled, a turn that came out empty left out. What fills a slot cannot
        begin a turn."""
        parts = _TURN.split(self.source)
        pairs = zip(parts[1::2], parts[2::2], strict=True)
        turns = [Message(role, self._filled(part, values)) for role, part in pairs]
        if not turns:
            turns = [Message("user", self.text(**values))]
        return tuple(turn for turn in turns if turn.content)

    def _filled(self, part: str, values: dict[str, Any]) -> str:
        unknown = self.slots - values.keys()
        if unknown:
            known = ", ".join(sorted(values))
            raise UserError(
                f"nothing fills the slot {min(unknown)!r}", place=self.place, remedy=f"slots known: {known}"
            )
        return _compiled(part).render(values).strip()


@dataclass(frozen=True)
class Templates:
    """The templates of one system by name; files of the same names in `own` stand in their place.

    `used` collects the hashes of those that were looked up.
    """

    system: str
    own: Path | None = None
    used: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Template:
        """Raises `UserError` where a template of the user's lacks a slot of the one it replaces."""
        file = SHIPPED / self.system / f"{name}.txt"
        template = Template(file.read_text(encoding="utf-8"), f"{self.system}/{file.name}")
        mine = self.own and self.own / file.name
        if mine and mine.exists():
            shipped, template = template, Template(mine.read_text(encoding="utf-8"), str(mine))
            missing = shipped.slots - template.slots
            if missing:
                slot = min(missing)
                raise UserError(
                    f"the template has no place for {slot!r}",
                    place=str(mine),
                    remedy=f"write {{{{ {slot} }}}} where it belongs",
                )
        self.used[name] = template.sha256
        return template

    def check(self) -> None:
        """Raises `UserError` where the user's folder is missing, or has a file that replaces nothing."""
        if self.own is None:
            return
        if not self.own.is_dir():
            raise UserError(
                "no such folder", place=f"templates: {self.own}", remedy="name a folder of .txt files"
            )
        known = [f"{name}.txt" for name in shipped_names(self.system)]
        for file in sorted(self.own.glob("*.txt")):
            if file.name not in known:
                raise UserError(
                    "it replaces no template", place=str(file), remedy=f"names known: {', '.join(known)}"
                )


@lru_cache
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


def shipped_names(system: str) -> list[str]:
    """The names of a system's templates."""
    return sorted(file.stem for file in (SHIPPED / system).glob("*.txt"))


@cache
def _environment() -> Any:
    from jinja2 import Environment, StrictUndefined

    return Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
