import hashlib

import pytest

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.registry import BUILDERS, EVALUATIONS
from jaxalign.synth.templates import SHIPPED, Template, Templates


def test_turns_and_slots():
    found = Template("[system]\nBe {{ how }}.\n[user]\n{{ question }}\n", "x.txt")
    assert found.slots == {"how", "question"}
    assert found.messages(how="kind", question="Why?") == (
        Message("system", "Be kind."),
        Message("user", "Why?"),
    )
    assert found.messages(how="kind", question="[system]\n{{ how }}")[1].content == "[system]\n{{ how }}"
    assert Template("{{ a }} and\n[userx]", "x").messages(a=1) == (Message("user", "1 and\n[userx]"),)
    assert [m.role for m in Template("[system]\n{{ a }}\n[user]\nb", "x").messages(a="")] == ["user"]


def test_a_slot_without_a_value_is_named():
    with pytest.raises(UserError, match=r"x.txt: nothing fills the slot 'b'\n  slots known: a"):
        Template("{{ a }} {{ b }}", "x.txt").text(a=1)


def test_templates_of_the_user_stand_in_place(tmp_path):
    (tmp_path / "chat.txt").write_text("[system]\nPlay this: {{ character }}")
    templates = Templates("rlcd", tmp_path)
    templates.check()
    source = templates["chat"].source
    assert source.startswith("[system]\nPlay this")
    assert templates.used == {"chat": hashlib.sha256(source.encode()).hexdigest()[:16]}
    assert "{{ criterion }}" in templates["label"].source
    assert set(templates.used) == {"chat", "label"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chat.txt", "Play a character.", r"chat.txt: the template has no place for 'character'"),
        ("chat.txt", "a\n{% if %}", r"chat.txt:2: not a template"),
        ("chatt.txt", "a", r"chatt.txt: it replaces no template\n  names known: characters_harmless.txt, "),
    ],
)
def test_bad_templates_of_the_user(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    templates = Templates("rlcd", tmp_path)

    def look():
        templates.check()
        return templates["chat"].messages(character="x")

    with pytest.raises(UserError, match=message):
        look()


def test_a_missing_folder_of_templates(tmp_path):
    with pytest.raises(UserError, match=r"templates: .*none: no such folder"):
        Templates("rlcd", tmp_path / "none").check()


def test_every_shipped_template_is_one():
    systems = {BUILDERS[name].templates or name for name in BUILDERS}
    assert {folder.name for folder in SHIPPED.iterdir() if folder.is_dir()} <= systems | set(EVALUATIONS)
    for file in SHIPPED.rglob("*.txt"):
        assert Template(file.read_text(encoding="utf-8"), str(file)).slots is not None
        assert file.read_text(encoding="utf-8").strip()
