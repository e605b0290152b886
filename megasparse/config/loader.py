"""YAML files and `a.b=c` overrides -> one checked `Config`, with the origin of every value.

Layers, later ones win: defaults, the chain of `base:` files from the root down, the file itself, overrides.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.files import Key, Yaml12, Yaml12Dumper, read_chain
from megasparse.config.messages import schema_keys, translate
from megasparse.config.rules import find_problems
from megasparse.config.schema import Config, L1Config
from megasparse.config.vocab import tokenizer_vocab_size


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
    """A configuration and where each dotted key was set; keys not in `origins` are defaults."""

    config: Config
    origins: dict[str, Origin]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its `base:` chain, apply `a.b=c` overrides, check all but the world size.

    Raises ConfigError, naming every problem. `model.vocab_size` is filled from `data.tokenizer` where that
    exists.
    """
    return load_with_origins(path, overrides).config


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "<dict>") -> Config:
    """A checked configuration from a nested dict, by the same rules as `load_config`."""
    origins = {key: Origin(0, source) for key, _ in _leaves(data)}
    return _build(copy.deepcopy(dict(data)), origins, overrides, source).config


def known_settings(saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration that another version of this package saved: the part that this one knows, and the other keys."""
    known = set(schema_keys())
    part: dict[str, Any] = {}
    unknown = []
    for key, value in _leaves(saved):
        if key not in known:
            unknown.append(".".join(key))
            continue
        section = part
        for name in key[:-1]:
            section = section.setdefault(name, {})
        section[key[-1]] = value
    return part, unknown


def load_with_origins(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """As `load_config`, and where each value came from."""
    merged: dict[str, Any] = {}
    origins: dict[Key, Origin] = {}
    for rank, (file, data, lines) in enumerate(read_chain(Path(path))):
        _merge(merged, origins, data, lambda key, f=file, n=lines, r=rank: Origin(r, str(f), n.get(key)))
    if "run" not in merged or (isinstance(merged["run"], dict) and "name" not in merged["run"]):
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem)
        _merge(merged, origins, {"run": {"name": stem}}, lambda key: Origin(-1, "name of the file"))
    return _build(merged, origins, overrides, str(path))


def dump_config(cfg: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back to an equal one."""
    return yaml.dump(cfg.model_dump(mode="json"), Dumper=Yaml12Dumper, sort_keys=False)


def _build(merged: dict[str, Any], origins: dict[Key, Origin], overrides: Sequence[str], source: str) -> LoadedConfig:
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
        problems += translate(error, merged)
        raise ConfigError(_locate(problems, origins, source)) from None
    if cfg.model.vocab_size is None and cfg.data.tokenizer and os.path.exists(cfg.data.tokenizer):
        try:
            size = tokenizer_vocab_size(cfg.data.tokenizer)
        except ConfigError as error:
            problems += error.problems
        else:
            cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": size})})
            origins[("model", "vocab_size")] = Origin(-1, cfg.data.tokenizer or "")
    cfg, ignored = _settle_l1(cfg, origins)
    problems += find_problems(cfg) + ignored
    if problems:
        raise ConfigError(_locate(problems, origins, source))
    return LoadedConfig(cfg, {".".join(key): origin for key, origin in origins.items()})


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
        data: Any = yaml.load(value, Yaml12)
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


def _settle_l1(cfg: Config, origins: dict[Key, Origin]) -> tuple[Config, list[Problem]]:
    """Deal with the keys of `sparsity.l1` that its mode ignores.

    One set in the same layer as the mode, or in a later one, is a mistake. One of an earlier layer goes back to its
    default: `sparsity.l1.mode=off` on the command line turns the term off whatever the file says about it.
    """
    constant = {"warmup_steps", "decay_start_step", "decay_steps", "decay_to"}
    target = {"target_l0", "gain"}
    unused = {"off": constant | target | {"coeff", "start_step"}, "constant": target, "target": constant}
    l1 = cfg.sparsity.l1
    since = origins.get(("sparsity", "l1", "mode"), Origin(-1, "default")).rank
    problems, resets = [], {}
    for name in sorted(unused[l1.mode]):
        key, value, default = ("sparsity", "l1", name), getattr(l1, name), L1Config.model_fields[name].default
        origin = origins.get(key)
        if origin is None or value == default:
            continue
        if origin.rank < since:
            resets[name] = default
            del origins[key]
            continue
        right = "constant" if name in constant else "target" if name in target else "constant or target"
        rule, fix = f"means nothing with sparsity.l1.mode: {l1.mode}", f"set mode: {right}, or leave it out"
        problems.append(Problem(".".join(key), rule, fix, value))
    if resets:
        sparsity = cfg.sparsity.model_copy(update={"l1": l1.model_copy(update=resets)})
        cfg = cfg.model_copy(update={"sparsity": sparsity})
    return cfg, problems


def _locate(problems: list[Problem], origins: dict[Key, Origin], source: str) -> list[Problem]:
    """Add to each problem the file and line (or the override) that set its key; `source` where a key is missing."""
    located = []
    for problem in problems:
        key = tuple(problem.key.split("."))
        origin = origins.get(key) or next((o for k, o in origins.items() if k[: len(key)] == key), None)
        where = problem.where or (str(origin) if origin else source if problem.rule == "missing" else "")
        located.append(Problem(problem.key, problem.rule, problem.fix, problem.value, where))
    return located
