"""YAML text and `a.b=c` overrides to plain values that remember the file and line of every key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str, ...]  # ("lora", "rank") is the key written `lora.rank`

# YAML 1.2's plain scalars. PyYAML's own (1.1) read 1e-5 as text, 010 as 8, 1:30 as 90 and `no` as False.
_SCALARS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"),
    "float": re.compile(
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
}
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + name for name in (*_SCALARS, "str", "map", "seq")}

# PyYAML files a resolver under the first character of the scalar; None stands for any character.
_RESOLVERS: Any = {None: [(_TAG + name, pattern) for name, pattern in _SCALARS.items()]}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS


_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar(_TAG + "float", _float(value)))


def _float(value: float) -> str:
    text = repr(value)  # 1e-08, where PyYAML writes 1.0e-08
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)


def scalar(text: str) -> Any:
    """The value of a plain scalar: None, bool, int, float or the text itself."""
    kind = next((name for name, pattern in _SCALARS.items() if pattern.match(text)), "str")
    read = {
        "null": lambda _: None,
        "bool": lambda t: t.lower() == "true",
        "int": int,
        "float": lambda t: float(t.lower().replace(".inf", "inf").replace(".nan", "nan")),
        "str": str,
    }
    return read[kind](text)


def inline(value: Any) -> str:
    """Plain values (dicts, lists, scalars) as one line of YAML, which `scalar` and `read_text` read back."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**9, sort_keys=False)
    return text.strip().removesuffix("...").strip()


@dataclass
class Layer:
    """Values read so far, the place where each key was written, and the mistakes of the reading.

    `unread` are keys whose value could not be read and stands as None: it was complained about once.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    unread: set[Key] = field(default_factory=set)

    def merge(self, other: Layer) -> None:
        """Lays `other` over this one: mappings merge, everything else replaces."""
        self.values = merged(self.values, other.values)
        self.places |= other.places
        self.mistakes += other.mistakes
        self.unread |= other.unread


def merged(under: Any, over: Any) -> Any:
    """`over` laid on `under`: mappings merge key by key, everything else replaces."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: merged(under.get(key), value) for key, value in over.items()}


def place_under(key: Key, value: Any, place: str) -> Layer:
    """A layer with one value at `key`, said to be written at `place`."""
    places = {key[:i]: place for i in range(1, len(key) + 1)}
    for name in reversed(key):
        value = {name: value}
    return Layer(values=value, places=places)


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> Layer:
    """One file laid over the files that it `extends:` (a path or a list of paths, relative to the file)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        return Layer(mistakes=[f"{path}: cannot be read: {reason}"])
    own, result = read_text(text, str(path)), Layer()
    bases = own.values.pop("extends", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        target = path.parent / str(base)
        if target.resolve() in (*seen, path.resolve()):
            result.mistakes.append(f"{own.places['extends',]}: extends: {base} comes round to itself")
            continue
        result.merge(read_file(target, (*seen, path.resolve())))
    result.merge(own)
    return result


def read_override(text: str) -> Layer:
    """`a.b=c`. The value is YAML where it opens with a bracket or a quote, else one scalar taken whole."""
    place = f"override {text!r}"
    dotted, equals, raw = text.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        return Layer(mistakes=[f"{place}: expected key=value"])
    if raw.lstrip()[:1] not in ("[", "{", '"', "'"):
        return place_under(key, scalar(raw.strip()), place)
    reader = _Reader(place, numbered=False)
    layer = place_under(key, reader.read_text(raw, key), place)
    layer.places |= reader.layer.places
    layer.mistakes, layer.unread = reader.layer.mistakes, reader.layer.unread
    return layer


def read_text(text: str, place: str) -> Layer:
    """The mapping written in `text`; `place` names its source in mistakes (`place:line: key: what`)."""
    reader = _Reader(place)
    values = reader.read_text(text, ())
    if isinstance(values, dict):
        reader.layer.values = values
    elif values is not None:
        reader.layer.mistakes.append(f"{place}:1: expected `key: value` lines, found {values!r}")
    return reader.layer


class _Reader:
    """Turns the YAML nodes of one source into plain values; places and mistakes go into its layer."""

    def __init__(self, place: str, *, numbered: bool = True) -> None:
        self.place, self.numbered, self.layer = place, numbered, Layer()
        self.open: list[int] = []  # ids of the collections being read: an alias to one of them never ends

    def read_text(self, text: str, key: Key) -> Any:
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            line = self._line(getattr(error, "problem_mark", None))
            return self._unread(line, key, f"not YAML: {problem}")
        return None if node is None else self.read(node, key)

    def read(self, node: yaml.Node, key: Key) -> Any:
        line = self._line(node.start_mark)
        if key:
            self.layer.places.setdefault(key, line)
        if id(node) in self.open:
            return self._unread(line, key, "refers to itself")
        if node.tag not in _TAGS:
            return self._unread(line, key, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed")
        self.open.append(id(node))
        value = self._value(node, key)
        self.open.pop()
        return value

    def _value(self, node: yaml.Node, key: Key) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*key, str(i))) for i, item in enumerate(node.value)]
        return node.value if node.tag == _TAG + "str" else scalar(node.value)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            line, path = self._line(name_node.start_mark), (*key, name)
            if name in values:
                self._mistake(line, path, f"written twice, first at {self.layer.places[path]}")
            self.layer.places.setdefault(path, line)
            values[name] = self.read(value_node, path)
        return values

    def _unread(self, line: str, key: Key, text: str) -> None:
        self.layer.unread.add(key)
        self._mistake(line, key, text)

    def _line(self, mark: Any) -> str:
        return f"{self.place}:{mark.line + 1}" if mark and self.numbered else self.place

    def _mistake(self, line: str, key: Key, text: str) -> None:
        self.layer.mistakes.append(": ".join(filter(None, (line, ".".join(key), text))))
