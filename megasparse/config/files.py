"""Reading YAML files: the `base:` chain, the line of each key, YAML 1.2 scalars, keys given twice.

Scalars follow YAML 1.2 (`1e-3` is a number, `off` is a word), so that no value changes its type by surprise.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.schema import Config

Key = tuple[str, ...]


class Yaml12(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2's core schema (and `_` between the thousands of integers)."""

    yaml_implicit_resolvers = {}  # type: ignore[var-annotated]  # noqa: RUF012


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Yaml12.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:[0-9]+|[0-9]{1,3}(?:_[0-9]{3})+)$"), list("-+0123456789")
)
Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
Yaml12.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
Yaml12.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class Yaml12Dumper(yaml.SafeDumper):
    """Quotes strings which YAML 1.2 reads as something else; those that YAML 1.1 does, PyYAML quotes itself."""


for _first, _resolvers in Yaml12.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        Yaml12Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def read_chain(path: Path) -> list[tuple[Path, dict[str, Any], dict[Key, int]]]:
    """The file and what it builds on, root first."""
    chain: list[tuple[Path, dict[str, Any], dict[Key, int]]] = []
    seen: list[Path] = []
    current: Path | None = path
    asked_by = ""
    while current is not None:
        resolved = current.resolve()
        if resolved in seen:
            loop = " -> ".join(str(file.name) for file in [*seen, resolved])
            raise ConfigError(
                [
                    Problem(
                        "base",
                        f"files build on each other in a circle: {loop}",
                        "remove one of the base: keys",
                        where=asked_by,
                    )
                ]
            )
        seen.append(resolved)
        data, lines = _read_yaml(current, asked_by)
        base = data.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(
                [
                    Problem(
                        "base",
                        "not the path of one YAML file",
                        "for example base: quickstart.yaml",
                        base,
                        f"{current}:{lines.get(('base',), 1)}",
                    )
                ]
            )
        chain.append((current, data, lines))
        asked_by = f"{current}:{lines.get(('base',), 1)}"
        current = current.parent / base if base else None
    return chain[::-1]


def _read_yaml(path: Path, asked_by: str) -> tuple[dict[str, Any], dict[Key, int]]:
    """A mapping and the line of each key in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = path.parent.glob("*.yaml") if isinstance(error, FileNotFoundError) else []
        hint = difflib.get_close_matches(path.stem, [file.stem for file in near], 1)
        fix = f"did you mean {path.parent / hint[0]}.yaml?" if hint else "check the path"
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            [
                Problem(
                    "base" if asked_by else "config file",
                    f"cannot be read: {reason}",
                    fix,
                    str(path),
                    asked_by,
                )
            ]
        ) from None
    loader = Yaml12(text)
    try:
        node = loader.get_single_node()
        lines: dict[Key, int] = {}
        if node is not None:
            _collect_lines(node, (), lines, path)
        data = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            [Problem("yaml", f"not valid YAML: {reason}", "check indentation, colons and quotes", where=where)]
        ) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(
            [
                Problem(
                    "yaml",
                    f"holds a {type(data).__name__}, not sections",
                    f"sections are {', '.join(Config.model_fields)}",
                    where=str(path),
                )
            ]
        )
    return data, lines


def _collect_lines(node: yaml.Node, key: Key, lines: dict[Key, int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        child = (*key, str(name.value))
        line = name.start_mark.line + 1
        if child in lines:
            raise ConfigError(
                [
                    Problem(
                        ".".join(child),
                        f"given twice (first in line {lines[child]})",
                        "keep one of them",
                        where=f"{path}:{line}",
                    )
                ]
            )
        lines[child] = line
        _collect_lines(value, child, lines, path)
