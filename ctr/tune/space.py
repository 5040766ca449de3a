"""Read a space of settings, the yaml of conf/tune or of the user, and turn its values into overrides.

Each key is one of the configuration, dotted. Its values are a range, `{low: 0.001, high: 0.1, log: true}` with `step`
instead of `log` where only multiples count, or `{choices: [..]}`. `extends: common` takes all keys of another space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera import conf
from tessera.ctr.config import Config, load_config
from tessera.ctr.overrides import keys_of
from tessera.ctr.yaml_errors import NOT_YAML, first_line
from tessera.embedding.errors import ConfigError, did_you_mean

SHIPPED = Path(conf.__file__).parent / "tune"
EXTENDS = "extends"
FORMS = ("low", "high", "log", "step", "choices")
#: What a trial may not set, because trials could not be compared or would not find their folders.
FIXED = (
    "data.",
    "trainer.run_dir",
    "trainer.resume",
    "trainer.seed",
    "trainer.early_stop.metric",
    "trainer.checkpoint.",
)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included: of a step, or evenly spread over their logarithms."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choices:
    """Values as a command line writes them: [400,400], null, true."""

    values: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return text_of(value) in self.values


Space = dict[str, Range | Choices]


def read_space(name: str) -> tuple[str, dict[str, Any]]:
    """Return where a space stands and its entries as they are written, those that it extends first.

    name: a file, or the name of a space of conf/tune.

    Raises ConfigError: there is none, with the nearest name, or it is no yaml of a space.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    path = SHIPPED / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise ConfigError(f"no space {name!r}{did_you_mean(name, shipped, 'expected a file, or a model with a space')}")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, OSError, *NOT_YAML) as error:
        raise ConfigError(f"space {path} cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"space {path}: found {str(found)[:40]!r}; expected a mapping from keys to their values")
    entries = {str(key): entry for key, entry in found.items()}
    base = entries.pop(EXTENDS, None)
    if base is None:
        return str(path), entries
    if base == name or base not in shipped:
        known = did_you_mean(base, shipped, f"expected one of {', '.join(shipped)}")
        raise ConfigError(f"space {path}: {EXTENDS} is {base!r}{known}")
    return str(path), {**read_space(base)[1], **entries}


def space_of(where: str, entries: Mapping[str, Any], overrides: Sequence[str]) -> Space:
    """Return the space of a job, its values checked by composing the configuration with them.

    where: names the space in messages. overrides: of the job, which all trials share.

    Raises ConfigError: naming the key of the space, what was found and what is expected.
    """
    if not entries:
        raise ConfigError(f"space {where} is empty; expected a key at least")
    config = load_config([*overrides], "")
    types = dict(keys_of(Config))
    space: Space = {}
    for key, entry in entries.items():
        fixed = next((one for one in FIXED if key == one or (one.endswith(".") and key.startswith(one))), None)
        if fixed is not None:
            raise ConfigError(
                f"space {where}: {key} is the same in all trials; expected no {fixed.rstrip('.')} in a space"
            )
        try:
            value = value_of(config, key)
        except KeyError:
            value = None  # composing says which key is near
        is_float = isinstance(value, float) or "float" in str(types.get(key, ""))
        space[key] = _values(f"space {where}: {key}", entry, whole=not is_float)
    twice = sorted({key for key in space if any(one.lstrip("+").partition("=")[0] == key for one in overrides)})
    if twice:
        raise ConfigError(f"{twice[0]} is given after -- and in space {where}; expected one of both")
    _check_composed(where, space, overrides)
    return space


def _values(where: str, entry: Any, *, whole: bool) -> Range | Choices:
    if not isinstance(entry, dict) or not entry:
        raise ConfigError(f"{where} is {entry!r}; expected {{low: .., high: ..}} or {{choices: [..]}}")
    for name in entry:
        if name not in FORMS:
            hint = did_you_mean(name, FORMS, f"known: {', '.join(FORMS)}")
            raise ConfigError(f"{where}: unknown {name!r}{hint}")
    if "choices" in entry:
        return _choices(where, entry)
    numbers = {name: entry.get(name) for name in ("low", "high", "step")}
    for name, value in numbers.items():
        needed = name != "step"
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if (needed or value is not None) and not is_number:
            raise ConfigError(f"{where}: {name} is {value!r}; expected a number")
    low, high, step, log = numbers["low"], numbers["high"], numbers["step"], entry.get("log", False)
    assert low is not None and high is not None
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log is {log!r}; expected true or false")
    if low >= high:
        raise ConfigError(f"{where}: low is {low:g} and high is {high:g}; expected low below high")
    if log and low <= 0:
        raise ConfigError(f"{where}: low is {low:g} with log: true; expected more than 0")
    if log and step is not None:
        raise ConfigError(f"{where} has log and step; expected one of both")
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{where}: step is {step:g}; expected more than 0, at most high - low")
    whole = whole and all(isinstance(one, int) for one in (low, high, 1 if step is None else step))
    return Range(low, high, log, step, whole)


def _choices(where: str, entry: dict[str, Any]) -> Choices:
    values = entry["choices"]
    if len(entry) > 1:
        raise ConfigError(f"{where} has choices and {next(name for name in entry if name != 'choices')}; expected one")
    if not isinstance(values, list) or len(values) < 2:
        raise ConfigError(f"{where}: choices are {values!r}; expected a list of two or more")
    texts = tuple(text_of(value) for value in values)
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: choices have {twice} twice; expected each once")
    return Choices(texts)


def _check_composed(where: str, space: Space, overrides: Sequence[str]) -> None:
    """Compose every end of a range and every choice at least once, several keys at a time."""
    ends = {
        key: list(values.values) if isinstance(values, Choices) else [text_of(values.low), text_of(values.high)]
        for key, values in space.items()
    }
    for number in range(max(map(len, ends.values()))):
        chosen = [f"{key}={texts[number % len(texts)]}" for key, texts in ends.items()]
        try:
            load_config([*overrides, *chosen], "")
        except ConfigError as error:
            raise ConfigError(f"space {where}: {error}") from None


def as_given(space: Space, config: Config) -> dict[str, Any]:
    """Return the values that the configuration has without a trial's, of those keys whose space holds them."""
    found = {}
    for key, values in space.items():
        value = value_of(config, key)
        if values.holds(value):
            found[key] = text_of(value) if isinstance(values, Choices) else value
    return found


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key. Raises KeyError: there is none."""
    value: Any = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise KeyError(key)
        value = value[name]
    return value


def text_of(value: Any) -> str:
    """Return a value as a command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(text_of(one) for one in value)}]"
    return repr(value) if isinstance(value, float) else str(value)


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Return the overrides that set these values, in the order of the space."""
    return [f"{key}={text_of(value)}" for key, value in values.items()]
