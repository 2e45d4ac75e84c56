"""Configuration: frozen pydantic models, YAML files and `a.b=c` overrides.

A configuration is a `Config` class. Its values come from YAML files, merged left to right, and then
from overrides, merged last. Every mistake is found before anything runs, and all are reported at once,
each with its file, line, key and the nearest known key.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from jaxalign.errors import UserError, nearest
from jaxalign.yaml_layers import Key, Layer, inline, merged, place_under, read_file, read_override

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration block. The docstring under an attribute is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True
    )


def load_config(
    cls: type[C],
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> C:
    """A `cls` from YAML files (merged left to right), then `a.b=c` overrides, then Python `values`.

    A key of `values` may be dotted; None switches an optional block off, as `null` does in YAML.
    Raises one `UserError` that lists every mistake with its place and the nearest known key.
    """
    layer = Layer()
    for path in files:
        layer.merge(read_file(Path(path)))
    for text in overrides:
        layer.merge(read_override(text))
    for name, value in (values or {}).items():
        plain = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        layer.merge(place_under(tuple(name.split(".")), plain, f"argument {name}"))
    try:
        config = cls.model_validate(_over_defaults(cls, layer.values))
    except ValidationError as error:
        order = {key: i for i, key in enumerate(layer.places)}  # as a reader of the files meets them
        errors = [e for e in error.errors(include_url=False) if _key(e) not in layer.unread]
        errors.sort(key=lambda e: order.get(_key(e), len(order)))
        _refuse(layer.mistakes + [_explain(cls, layer, e) for e in errors])
    if layer.mistakes:
        _refuse(layer.mistakes)
    return config


def _refuse(mistakes: list[str]) -> typing.NoReturn:
    if len(mistakes) == 1:
        raise UserError(mistakes[0])
    raise UserError(f"{len(mistakes)} mistakes in the configuration:\n  " + "\n  ".join(mistakes))


def _over_defaults(cls: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Lays a partly written block over the default that its owner gives it, not over the block's own."""
    result = dict(values)
    for name, info in cls.model_fields.items():
        block = _block(info.annotation)
        if block is None or not isinstance(result.get(name), dict):
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        under = default.model_dump(exclude_unset=True) if isinstance(default, block) else {}
        result[name] = _over_defaults(block, merged(under, result[name]))
    return result


def _key(error: Any) -> Key:
    return tuple(str(part) for part in error["loc"])


def _explain(cls: type[Config], layer: Layer, error: Any) -> str:
    """One line for one pydantic error: place, key, what is wrong."""
    key = _key(error)
    place = next((layer.places[key[:i]] for i in range(len(key), 0, -1) if key[:i] in layer.places), "")
    dotted = ".".join(key)
    if error["type"] == "extra_forbidden":
        text = f"unknown key{_nearest_key(cls, key)}"
    elif error["type"] == "missing":
        text = f"is needed: {_help_of(cls, key)}"
    elif error["type"] in ("tuple_type", "list_type"):
        text = f"expected a list such as [a, b], found {_kind(error['input'])}"
    else:
        message = error["msg"].removeprefix("Value error, ")
        text = f"{message[:1].lower()}{message[1:]}"
        if not isinstance(error["input"], dict | list | BaseModel):
            text += f" (found {error['input']!r})"
    return ": ".join(part for part in (place, dotted, text) if part)


def _help_of(cls: type[Config], key: Key) -> str:
    dotted = ".".join(key)
    return next((row.help for row in describe(cls) if row.key == dotted and row.help), "it has no default")


def _nearest_key(cls: type[Config], key: Key) -> str:
    """A hint: a key elsewhere with the same last part, else the likest sibling, else the likest key."""
    known, dotted, prefix = [row.key for row in describe(cls)], ".".join(key), ".".join(key[:-1])
    elsewhere = [k for k in known if k.rpartition(".")[2] == key[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return nearest(dotted, _children(known, prefix)) or nearest(dotted, known)


def _children(keys: Iterable[str], prefix: str) -> set[str]:
    start = f"{prefix}." if prefix else ""
    return {start + k[len(start) :].split(".")[0] for k in keys if k.startswith(start)}


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")


class Row(NamedTuple):
    """One line of help: `key` is dotted, `type` is in words, `default` is as YAML would write it."""

    key: str
    type: str
    default: str
    help: str


def describe(cls: type[Config]) -> list[Row]:
    """One row for every key of `cls`, blocks included, in the order in which they are written."""
    return list(_rows(cls, cls.model_construct(), ""))


def _rows(cls: type[Config], defaults: Any, prefix: str) -> Iterator[Row]:
    for name, info in cls.model_fields.items():
        block = _block(info.annotation)
        default = getattr(defaults, name, None)
        text = " ".join((info.description or "").split())
        if block is None:
            shown = "required" if info.is_required() else _inline(default)
            yield Row(prefix + name, type_words(info.annotation), shown, text)
            continue
        if _is_optional(info.annotation):
            yield Row(prefix + name, "block or null", "null" if default is None else "on", text)
        inner = default if default is not None else block.model_construct()
        yield from _rows(block, inner, f"{prefix}{name}.")


def _block(annotation: Any) -> type[Config] | None:
    """The `Config` class of a field that is a block (or null), else None."""
    found = [a for a in (typing.get_args(annotation) or (annotation,)) if a is not type(None)]
    return (
        found[0] if len(found) == 1 and isinstance(found[0], type) and issubclass(found[0], Config) else None
    )


def _is_optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def type_words(annotation: Any) -> str:
    """A type in words: `int`, `a | b` for a choice, `list of str`, `float or null`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_words(args[0])
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        words = [type_words(a) for a in args if a is not type(None)]
        return " or ".join(words + ["null"] * (len(words) < len(args)))
    if origin in (tuple, list, Sequence):
        return f"list of {type_words(args[0])}"
    if origin is not None:
        return getattr(origin, "__name__", str(origin))
    name = getattr(annotation, "__name__", str(annotation))
    return {"str": "text", "Path": "path"}.get(name, name)


def json_schema(cls: type[Config]) -> dict[str, Any]:
    """The JSON schema of `cls`, for editors that complete and check YAML."""
    return cls.model_json_schema()


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, with the help text of every key as a comment above it.

    `load_config` reads it back to an equal object.
    """
    return "\n".join(_lines(config, "")) + "\n"


def _lines(config: Config, indent: str) -> Iterator[str]:
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if info.description:
            yield f"{indent}# {' '.join(info.description.split())}"
        if isinstance(value, Config):
            inner = list(_lines(value, indent + "  "))
            yield f"{indent}{name}:" + ("" if inner else " {}")
            yield from inner
        else:
            yield f"{indent}{name}: {_inline(value)}"


def _inline(value: Any) -> str:
    return inline(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
