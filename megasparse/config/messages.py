"""pydantic's validation errors in words that say what to set, with a did-you-mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from megasparse.config.errors import Problem
from megasparse.config.schema import BLENDS, Config

Key = tuple[str, ...]


def schema_keys(model: type[BaseModel] = Config, key: Key = ()) -> Iterator[Key]:
    """Every key that a configuration may hold, sections too."""
    for name, info in model.model_fields.items():
        yield (*key, name)
        section = _section_type(info.annotation)
        if section is not None:
            yield from schema_keys(section, (*key, name))


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _suggest(key: Key) -> str:
    """Did-you-mean: a sibling of similar spelling, else the same name in another section."""
    known = list(schema_keys())
    siblings = {k[-1]: k for k in known if k[:-1] == key[:-1]}
    close = difflib.get_close_matches(key[-1], siblings, 1, 0.6)
    if close:
        return f"did you mean {'.'.join(siblings[close[0]])}?"
    elsewhere = [k for k in known if k[-1] == key[-1]]
    if not elsewhere:
        names = difflib.get_close_matches(key[-1], {k[-1] for k in known}, 1, 0.75)
        elsewhere = [k for k in known if names and k[-1] == names[0]]
    if elsewhere:
        return f"did you mean {' or '.join('.'.join(k) for k in elsewhere)}?"
    place = f"section {'.'.join(key[:-1])}" if len(key) > 1 else "the top level"
    return f"{place} has: {', '.join(siblings)}"


def translate(error: ValidationError, data: Mapping[str, Any]) -> list[Problem]:
    """pydantic's errors in our words; one problem a key (a union reports one error a member)."""
    known = set(schema_keys())
    problems: dict[Key, Problem] = {}
    for item in error.errors(include_url=False):
        loc = tuple(str(part) for part in item["loc"])
        unknown = item["type"] == "extra_forbidden"
        key = loc
        while key and not unknown and key not in known:  # union members and list positions are no keys of the file
            key = key[:-1]
        if key in problems:
            continue
        dotted = ".".join(key)
        if unknown:
            problems[key] = Problem(dotted, "unknown key", _suggest(key))
        elif item["type"] == "missing" and key == loc:
            problems[key] = Problem(dotted, "missing", f"set {dotted}")
        else:
            problems[key] = Problem(dotted, _sentence(item), _fix(item, key), _value_at(data, key))
    return list(problems.values())


def _value_at(data: Any, key: Key) -> Any:
    for name in key:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def _sentence(item: Any) -> str:
    if item["type"] in ("model_type", "model_attributes_type"):
        return "is a section, with keys of its own"
    if item["type"] == "string_pattern_mismatch":  # run.name alone has one
        return "may hold letters, digits, '.', '_' and '-', and begins with a letter or digit"
    text = "is missing" if item["type"] == "missing" else str(item["msg"])
    text = text.removeprefix("Input ").removeprefix("Value error, ")
    position = [part for part in item["loc"] if isinstance(part, int)]
    return f"item {position[0] + 1} {text}" if position else text


def _fix(item: Any, key: Key) -> str:
    kind, value = item["type"], item["input"]
    if key in [("data", name) for name in BLENDS]:
        return "write prefix, [prefix, ...] or [[weight, prefix], ...]"
    if kind in ("model_type", "model_attributes_type"):
        return f"{'.'.join(key)} has: {', '.join(k[-1] for k in schema_keys() if k[:-1] == key)}"
    if kind == "literal_error" and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']*)'", item["ctx"]["expected"]), 1, 0.5)
        return f"did you mean {close[0]}?" if close else ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write it as {int(value)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"quote it: {'.'.join(key)}=\"'{value}'\" on the command line, '{value}' in a file"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return "write a plain number, without quotes" if kind != "bool_type" else "write true or false, without quotes"
    return ""
