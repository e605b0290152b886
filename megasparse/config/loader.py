"""YAML files and `a.b=c` overrides -> one checked `Config`, with the origin of every value.

Layers, later ones win: defaults, the chain of `base:` files from the root down, the file itself, overrides.
Scalars follow YAML 1.2 (`1e-3` is a number, `off` is a word), so that no value changes its type by surprise.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ValidationError

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.rules import find_problems
from megasparse.config.schema import Config
from megasparse.config.vocab import tokenizer_vocab_size

Key = tuple[str, ...]


class _Yaml(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2's core schema (and `_` in integers)."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Yaml.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


@dataclass(frozen=True)
class Origin:
    """Where a value was set: the layer's rank (later wins), its name and, in a file, the line (1-based)."""

    rank: int
    layer: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.layer}:{self.line}" if self.line else self.layer


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and, for each dotted key that some layer set, where that was; other keys are defaults."""

    config: Config
    origins: dict[str, Origin]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its `base:` chain, apply `a.b=c` overrides and check everything but the world size.

    Raises ConfigError, naming every problem. `model.vocab_size` is filled from `data.tokenizer` where that exists.
    """
    return load_with_origins(path, overrides).config


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "<dict>") -> Config:
    """A checked configuration from a nested dict, by the same rules as `load_config`."""
    origins = {key: Origin(0, source) for key, _ in _leaves(data)}
    return _build(dict(data), origins, overrides).config


def load_with_origins(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """As `load_config`, and where each value came from."""
    merged: dict[str, Any] = {}
    origins: dict[Key, Origin] = {}
    for rank, (file, data, lines) in enumerate(_read_chain(Path(path))):
        _merge(merged, origins, data, lambda key, f=file, n=lines, r=rank: Origin(r, str(f), n.get(key)))
    if "run" not in merged or (isinstance(merged["run"], dict) and "name" not in merged["run"]):
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem)
        _merge(merged, origins, {"run": {"name": stem}}, lambda key: Origin(-1, "name of the file"))
    return _build(merged, origins, overrides)


def dump_config(cfg: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back to an equal one."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def _build(merged: dict[str, Any], origins: dict[Key, Origin], overrides: Sequence[str]) -> LoadedConfig:
    rank = 1 + max((origin.rank for origin in origins.values()), default=0)
    problems = []
    for text in overrides:
        try:
            data = _parse_override(text)
        except ConfigError as error:
            problems += error.problems
            continue
        _merge(merged, origins, data, lambda key, t=text: Origin(rank, f"override {t}"))
    try:
        cfg = Config.model_validate(merged)
    except ValidationError as error:
        problems += _translate(error, merged)
        raise ConfigError(_locate(problems, origins)) from None
    if cfg.model.vocab_size is None and cfg.data.tokenizer and Path(cfg.data.tokenizer).exists():
        try:
            size = tokenizer_vocab_size(cfg.data.tokenizer)
        except ConfigError as error:
            problems += error.problems
        else:
            cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": size})})
            origins[("model", "vocab_size")] = Origin(-1, cfg.data.tokenizer or "")
    problems += find_problems(cfg)
    problems += _l1_keys_of_other_modes(cfg, origins)
    if problems:
        raise ConfigError(_locate(problems, origins))
    return LoadedConfig(cfg, {".".join(key): origin for key, origin in origins.items()})


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any], dict[Key, int]]]:
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
        near = path.parent.glob("*.yaml") if path.parent.is_dir() else []
        hint = difflib.get_close_matches(path.name, [file.name for file in near], 1)
        fix = f"did you mean {path.parent / hint[0]}?" if hint else "check the path"
        reason = getattr(error, "strerror", None) or str(error)
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
    loader = _Yaml(text)
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
            [
                Problem(
                    "yaml", f"not valid YAML: {reason}", "check indentation, colons and quotes", where=where
                )
            ]
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


def _parse_override(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            [
                Problem(
                    text,
                    "not an override",
                    "write section.key=value, for example training.steps=100",
                    where="command line",
                )
            ]
        )
    try:
        data: Any = yaml.load(value, _Yaml)
    except yaml.YAMLError as error:
        raise ConfigError(
            [
                Problem(
                    name,
                    f"not a YAML value: {getattr(error, 'problem', error)}",
                    "quote the value",
                    value,
                    "command line",
                )
            ]
        ) from None
    for key in reversed(keys):
        data = {key: data}
    assert isinstance(data, dict)
    return data


def _merge(
    into: dict[str, Any], origins: dict[Key, Origin], data: Mapping[str, Any], origin_of: Any, key: Key = ()
) -> None:
    """Deep merge of mappings; anything else, lists too, replaces what was there."""
    for name, value in data.items():
        child = (*key, str(name))
        if isinstance(value, Mapping):
            if not isinstance(into.get(name), dict):
                into[name] = {}
            _merge(into[name], origins, value, origin_of, child)
            if not value:
                origins[child] = origin_of(child)
        else:
            for old in [k for k in origins if k[: len(child)] == child]:
                del origins[old]
            into[name] = value
            origins[child] = origin_of(child)


def _leaves(data: Mapping[str, Any], key: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*key, str(name)))
        else:
            yield (*key, str(name)), value


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


def _translate(error: ValidationError, data: Mapping[str, Any]) -> list[Problem]:
    """pydantic's errors in our words; one problem a key (a union reports one error a member)."""
    known = set(schema_keys())
    problems: dict[Key, Problem] = {}
    for item in error.errors(include_url=False):
        loc = tuple(str(part) for part in item["loc"])
        unknown = item["type"] == "extra_forbidden"
        key = loc
        while (
            key and not unknown and key not in known
        ):  # union members and list positions are no keys of the file
            key = key[:-1]
        if key in problems:
            continue
        dotted = ".".join(key)
        if unknown:
            problems[key] = Problem(dotted, "unknown key", _suggest(key))
        elif item["type"] == "missing":
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
    text = str(item["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    position = [part for part in item["loc"] if isinstance(part, int)]
    return f"item {position[0] + 1} {text}" if position else text


def _fix(item: Any, key: Key) -> str:
    kind, value = item["type"], item["input"]
    if kind == "literal_error" and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']*)'", item["ctx"]["expected"]), 1, 0.5)
        return f"did you mean {close[0]}?" if close else ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write it as {int(value)}"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return (
            "write a plain number, without quotes"
            if kind != "bool_type"
            else "write true or false, without quotes"
        )
    return ""


def _l1_keys_of_other_modes(cfg: Config, origins: dict[Key, Origin]) -> Iterator[Problem]:
    """Keys of `sparsity.l1` that its mode ignores.

    Only those set in the same layer as the mode, or a later one: `sparsity.l1.mode=off` on the command line turns
    the term off whatever else the file says about it.
    """
    constant = {"warmup_steps", "decay_start_step", "decay_steps", "decay_to"}
    target = {"target_l0", "min_coeff", "max_coeff", "gain", "ema_decay"}
    unused = {"off": constant | target | {"coeff", "start_step"}, "constant": target, "target": constant}
    mode = cfg.sparsity.l1.mode
    since = origins.get(("sparsity", "l1", "mode"), Origin(-1, "default")).rank
    for name in sorted(unused[mode]):
        origin = origins.get(("sparsity", "l1", name))
        if origin is not None and origin.rank >= since:
            right = "constant" if name in constant else "target" if name in target else "constant or target"
            yield Problem(
                f"sparsity.l1.{name}",
                f"means nothing with sparsity.l1.mode: {mode}",
                f"set mode: {right}, or leave it out",
                getattr(cfg.sparsity.l1, name),
            )


def _locate(problems: list[Problem], origins: dict[Key, Origin]) -> list[Problem]:
    """Add to each problem the file and line (or the override) that set its key."""
    located = []
    for problem in problems:
        key = tuple(problem.key.split("."))
        origin = origins.get(key) or next((o for k, o in origins.items() if k[: len(key)] == key), None)
        where = problem.where or (str(origin) if origin else "")
        located.append(Problem(problem.key, problem.rule, problem.fix, problem.value, where))
    return located
