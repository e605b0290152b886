"""The one exception that every configuration mistake ends in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class _NoValue:
    """Stands for itself, also in another process."""


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted key, what is wrong, what to set instead and where the value came from."""

    key: str
    rule: str
    fix: str = ""
    value: Any = _NoValue
    where: str = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        value = "" if self.value is _NoValue else f" = {self.value!r}"
        fix = f"\n    -> {self.fix}" if self.fix else ""
        return f"{where}{self.key}{value}: {self.rule}{fix}"


class ConfigError(Exception):
    """A configuration cannot be used. Holds every problem that was found, not only the first."""

    def __init__(self, problems: list[Problem] | str, host_specific: bool = False) -> None:
        """`host_specific`: other ranks of the job may not have the problem (files that one host lacks)."""
        self.host_specific = host_specific
        self.problems = [Problem("config", problems)] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the configuration\n"
        super().__init__(head + "\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:  # a job's ranks tell it to one another
        return ConfigError, (self.problems, self.host_specific)
