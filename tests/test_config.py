"""Configuration: what is read, what is merged, and that every mistake is named with its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from jaxalign.config import Config, describe, dump_config, json_schema, load_config
from jaxalign.errors import UserError
from jaxalign.yaml_layers import inline, read_text


class Adapter(Config):
    rank: int = Field(16, ge=1)
    """columns of A"""
    targets: tuple[str, ...] = ("q", "v")
    """linear layers"""


class Settings(Config):
    learning_rate: float = 2e-4
    """peak learning rate,
    reached after warm-up"""
    adapter: Adapter | None = Adapter(rank=32)
    """adapters; null trains every weight"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    name: str = "run"
    limit: float | None = None
    folder: Path = Path("out")
    flag: bool = False

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.limit is not None and self.limit < self.learning_rate:
            raise ValueError("limit is below learning_rate")
        return self


class Needy(Config):
    model: str
    """what to start from (-m)"""


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _mistakes(*args: object, cls: type[Config] = Settings, **kwargs: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(cls, *args, **kwargs)  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    return [line.strip() for line in (lines[1:] if len(lines) > 1 else lines)]


def test_files_merge_left_to_right_then_overrides_then_values(tmp_path):
    first = _write(tmp_path, "a.yaml", "learning_rate: 1e-5\nadapter: {rank: 4}\nname: first\n")
    second = _write(tmp_path, "b.yaml", "name: second\nadapter: {targets: [k]}\n")
    config = load_config(Settings, [first, second], ["name=third", "flag=true"], {"limit": 1})
    assert config == Settings(
        learning_rate=1e-5, adapter=Adapter(rank=4, targets=("k",)), name="third", flag=True, limit=1.0
    )


def test_extends_lays_a_file_over_its_bases(tmp_path):
    _write(tmp_path, "base.yaml", "learning_rate: 1e-3\nname: base\n")
    (tmp_path / "sub").mkdir()
    child = _write(tmp_path / "sub", "child.yaml", "extends: ../base.yaml\nname: child\n")
    grandchild = _write(tmp_path, "g.yaml", "extends: [base.yaml, sub/child.yaml]\nflag: true\n")
    assert load_config(Settings, [child]) == Settings(learning_rate=1e-3, name="child")
    assert load_config(Settings, [grandchild]) == Settings(learning_rate=1e-3, name="child", flag=True)


def test_extends_in_a_circle_is_a_mistake(tmp_path):
    _write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = _write(tmp_path, "b.yaml", "extends: a.yaml\nname: x\n")
    assert _mistakes([path]) == [f"{tmp_path / 'a.yaml'}:1: extends: b.yaml comes round to itself"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("010", "010"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("-7", -7),
        (".inf", math.inf),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_are_read_as_yaml_1_2_does(text, value):
    read = read_text(f"key: {text}\n", "x").values["key"]
    assert read == value
    assert type(read) is type(value)


def test_a_block_written_in_part_keeps_the_default_its_owner_gives_it():
    assert load_config(Settings, [], ["adapter.targets=[k]"]).adapter == Adapter(rank=32, targets=("k",))


def test_null_turns_a_block_off_and_a_key_turns_it_on_again():
    assert load_config(Settings, [], ["adapter=null"]).adapter is None
    assert load_config(Settings, [], ["adapter=null", "adapter.rank=3"]).adapter == Adapter(rank=3)
    assert load_config(Settings, values={"adapter": None}).adapter is None
    assert load_config(Settings, values={"adapter": Adapter(rank=8)}).adapter == Adapter(rank=8)
    assert load_config(Settings, values={"adapter.rank": 8}).adapter == Adapter(rank=8)


def test_an_override_value_is_taken_whole():
    assert load_config(Settings, [], ["name=a=b: c, d # e"]).name == "a=b: c, d # e"
    assert load_config(Settings, [], ["name='1e-5'"]).name == "1e-5"
    assert load_config(Settings, [], ["name=17"]).name == "17"


def test_all_mistakes_are_reported_at_once_each_with_its_place(tmp_path):
    path = _write(
        tmp_path, "x.yaml", "learning_rat: 3\nadapter:\n  rank: x\n  rnak: 4\nrank: 4\noptimizer: foo\n"
    )
    missing = tmp_path / "none.yaml"
    found = _mistakes([path, missing], ["foo", "adapter.targets=q", "limit=much", "flag=[1"])
    assert sorted(found) == sorted(
        [
            f"{path}:1: learning_rat: unknown key; did you mean 'learning_rate'?",
            f"{path}:3: adapter.rank: input should be a valid integer, unable to parse string as an integer "
            "(found 'x')",
            f"{path}:4: adapter.rnak: unknown key; did you mean 'adapter.rank'?",
            f"{path}:5: rank: unknown key; did you mean 'adapter.rank'?",
            f"{path}:6: optimizer: input should be 'adamw' or 'sgd' (found 'foo')",
            f"{missing}: cannot be read: No such file or directory",
            "override 'foo': expected key=value",
            "override 'adapter.targets=q': adapter.targets: expected a list such as [a, b], found str 'q'",
            "override 'limit=much': limit: input should be a valid number, unable to parse string as a "
            "number (found 'much')",
            "override 'flag=[1': flag: not YAML: expected ',' or ']', but got '<stream end>'",
        ]
    )


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("name: a\nname: b\n", "{path}:2: name: written twice, first at {path}:1"),
        ("adapter:\n  rank: 1\n  rank: 1\n", "{path}:3: adapter.rank: written twice, first at {path}:2"),
        ("- name\n", "{path}:1: expected `key: value` lines, found ['name']"),
        ("name: [\n", "{path}:2: not YAML: expected the node content, but found '<stream end>'"),
        (
            "name: !!python/object:os.system x\n",
            "{path}:1: name: the tag !!python/object:os.system is not allowed",
        ),
        ("adapter: &a\n  rank: *a\n", "{path}:1: adapter.rank: refers to itself"),
        (
            "adapter: 3\n",
            "{path}:1: adapter: input should be a valid dictionary or instance of Adapter (found 3)",
        ),
        (
            "adapter: {rank: 0}\n",
            "{path}:1: adapter.rank: input should be greater than or equal to 1 (found 0)",
        ),
    ],
)
def test_a_mistake_in_a_file_names_file_line_and_key(tmp_path, text, mistake):
    path = _write(tmp_path, "x.yaml", text)
    assert mistake.format(path=path) in _mistakes([path])


def test_a_file_that_is_not_text_is_a_mistake(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert _mistakes([path]) == [f"{path}: cannot be read: it is not UTF-8 text"]


def test_a_rule_across_keys_is_reported():
    assert _mistakes([], ["limit=0"]) == ["limit is below learning_rate"]


def test_a_key_without_a_value_says_what_it_is_for():
    assert _mistakes(cls=Needy) == ["model: is needed: what to start from (-m)"]


def test_a_wrong_python_argument_is_named():
    assert _mistakes(values={"optimiser": "sgd"}) == [
        "argument optimiser: optimiser: unknown key; did you mean 'optimizer'?"
    ]


def test_dumped_configuration_reads_back_equal_and_carries_the_help(tmp_path):
    config = Settings(name="1e-5", limit=math.inf, adapter=None, folder=Path("a b"), learning_rate=1e-12)
    text = dump_config(config)
    assert load_config(Settings, [_write(tmp_path, "x.yaml", text)]) == config
    assert "# peak learning rate, reached after warm-up\nlearning_rate: 1e-12\n" in text
    nested = dump_config(Settings())
    assert "adapter:\n  # columns of A\n  rank: 32\n" in nested
    assert load_config(Settings, [_write(tmp_path, "y.yaml", nested)]) == Settings()


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)
)
def test_any_value_written_inline_reads_back(value):
    read = read_text(f"key: {inline(value)}\n", "x")
    assert (read.values, read.mistakes) == ({"key": value}, [])


def test_describe_lists_every_key_with_type_default_and_help():
    rows = {row.key: row for row in describe(Settings)}
    assert list(rows)[:4] == ["learning_rate", "adapter", "adapter.rank", "adapter.targets"]
    assert rows["adapter.rank"] == ("adapter.rank", "int", "32", "columns of A")
    assert rows["learning_rate"][1:] == ("float", "0.0002", "peak learning rate, reached after warm-up")
    assert rows["adapter"].type == "block or null"
    assert rows["optimizer"].type == "adamw | sgd"
    assert rows["limit"][1:3] == ("float or null", "null")
    assert rows["adapter.targets"][1:3] == ("list of text", "[q, v]")
    assert [row.default for row in describe(Needy)] == ["required"]


def test_the_schema_knows_nested_keys_and_help():
    schema = json_schema(Settings)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Adapter"]["properties"]["rank"]["description"] == "columns of A"
