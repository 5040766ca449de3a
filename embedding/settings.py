"""Write a setting once: its default, what it means and which values it takes, beside the field that holds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tessera.embedding.errors import ConfigError, did_you_mean

_REQUIRED = object()
LARGEST = 2**63  # of whole numbers, which tensors and files hold in 64 bits


@dataclass(frozen=True)
class Rule:
    """Which values a setting takes, apart from None. A number that has a bound must be finite.

    expected: says so in a message, where another sentence than the one made from the bounds is clearer.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    expected: str = ""
    optional: bool = False
    at_most: float | None = None

    def problem(self, value: Any) -> str:
        """Return the end of a message, "is 0; expected at least 1"; '' if the value is one that the setting takes."""
        if isinstance(value, int) and not -LARGEST <= value < LARGEST:
            return f"is {value}; expected {self.expected or 'a whole number of at most 64 bits'}"
        if self.choices:
            return "" if value in self.choices else self._other_than_choices(value)
        if self.at_least is self.above is self.below is self.at_most is None or self._holds(value):
            return ""
        return f"is {value}; expected {self.expected or self._bounds(value)}"

    def _holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def _other_than_choices(self, value: Any) -> str:
        *most, last = self.choices
        listed = f"{', '.join(most)} or {last}" if most else last
        return f"is {value!r}; expected {listed}{did_you_mean(value, self.choices, form='{}')}"

    def _bounds(self, value: float) -> str:
        if self.above is not None and self.below is not None:
            return f"{'null or ' * self.optional}between {self.above} and {self.below}"
        parts = [f"at least {self.at_least}"] * (self.at_least is not None)
        parts += [f"above {self.above}"] * (self.above is not None)
        parts += [f"below {self.below}"] * (self.below is not None)
        parts += [f"at most {self.at_most}"] * (self.at_most is not None)
        bounds = " and ".join(parts)
        if not math.isfinite(value):
            return f"a finite number {bounds}"
        return bounds if self.at_least is not None else f"a number {bounds}"


def setting(
    default: Any,
    comment: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Collection[str] = (),
    expected: str = "",
) -> Any:
    """Return the field of a dataclass with its default, what it means and which values `check` lets pass.

    comment: one line for users. choices: of a text, or of each value of a mapping. expected: see `Rule`.
    """
    rule = Rule(at_least, above, below, tuple(choices), expected, default is None, at_most)
    metadata = {"comment": comment, "rule": rule}
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(comment: str, **rule: Any) -> Any:
    """Return the field of a setting that has no default; see `setting`."""
    return setting(_REQUIRED, comment, **rule)


def section(kind: Callable[[], Any], comment: str) -> Any:
    """Return the field of a dataclass that holds another one, whose settings belong together."""
    return dataclasses.field(default_factory=kind, metadata={"comment": comment})


def same_as(kind: Any, name: str, comment: str | None = None, default: Any = _REQUIRED) -> Any:
    """Return a field with the rule of a setting of another dataclass, and with its default and comment unless others
    are given."""
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    metadata = {**field.metadata, "comment": field.metadata["comment"] if comment is None else comment}
    return dataclasses.field(default=field.default if default is _REQUIRED else default, metadata=metadata)


def comment_of(field: dataclasses.Field[Any]) -> str:
    """Return what a field means; '' if it is no setting."""
    comment: str = field.metadata.get("comment", "")
    return comment


def rule_of(field: dataclasses.Field[Any]) -> Rule:
    """Return which values a field takes."""
    rule: Rule = field.metadata.get("rule", Rule())
    return rule


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; `dataclasses.MISSING` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check(config: Any, where: str = "") -> None:
    """Check the settings of a dataclass and of those in it by their rules.

    where: stands before the name of each setting ("trainer.").

    Raises:
        ConfigError: for the first one that holds what it does not take: its name, what was found and what is expected.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), where + field.name
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
            continue
        for key, one in _values(name, value):
            problem = "" if one is None else rule_of(field).problem(one)
            if problem:
                raise ConfigError(f"{key} {problem}")


def _values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{name}.{key}", one) for key, one in value.items())
    else:
        yield name, value
