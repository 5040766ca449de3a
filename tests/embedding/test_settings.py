"""A setting is written once: default, meaning and which values it takes."""

import math
from dataclasses import MISSING, dataclass, fields

import pytest

from tessera.embedding.errors import ConfigError
from tessera.embedding.settings import check, comment_of, default_of, required, same_as, section, setting


@dataclass
class Inner:
    rate: float = setting(0.1, "of learning", above=0)
    share: float | None = setting(None, "of what is kept", above=0, below=1)
    kept: float = setting(0.9, "from step to step", at_least=0, below=1)


@dataclass
class Outer:
    size: int = required("rows", at_least=1)
    kind: str = setting("one", "one | two | three", choices=("one", "two", "three"))
    kinds: dict[str, str] | None = setting(None, "by name", choices=("one", "two"))
    names: list[str] = setting([], "any")
    year: int = setting(2026, "of the data", at_least=1990, expected="a year of this system")
    inner: Inner = section(Inner, "what is inside")
    rate: float = same_as(Inner, "rate")
    slow: float = same_as(Inner, "rate", "of old rows", default=0.01)


def test_defaults_and_meanings_are_those_that_are_written():
    outer = Outer(3)
    assert (outer.kind, outer.names, outer.rate, outer.slow, outer.inner) == ("one", [], 0.1, 0.01, Inner(0.1))
    assert Outer(3).names is not outer.names and Outer(3).inner is not outer.inner
    by_name = {field.name: field for field in fields(Outer)}
    assert [comment_of(by_name[name]) for name in ("size", "rate", "slow")] == ["rows", "of learning", "of old rows"]
    assert default_of(by_name["size"]) is MISSING and default_of(by_name["names"]) == []


def test_what_it_takes_passes():
    check(Outer(1, "three", {"a": "two"}, ["x"], 1990, Inner(5.0, 0.5, 0.0)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (Outer(0), "a.size is 0; expected at least 1"),
        (Outer(1, "tow"), "a.kind is 'tow'; expected one, two or three; did you mean two?"),
        (Outer(1, kinds={"a": "one", "b": "x"}), "a.kinds.b is 'x'; expected one or two"),
        (Outer(1, year=3), "a.year is 3; expected a year of this system"),
        (Outer(1, inner=Inner(0)), "a.inner.rate is 0; expected a number above 0"),
        (Outer(1, inner=Inner(math.nan)), "a.inner.rate is nan; expected a finite number above 0"),
        (Outer(1, inner=Inner(math.inf)), "a.inner.rate is inf; expected a finite number above 0"),
        (Outer(1, inner=Inner(share=1.0)), "a.inner.share is 1.0; expected null or between 0 and 1"),
        (Outer(1, inner=Inner(kept=1)), "a.inner.kept is 1; expected at least 0 and below 1"),
        (Outer(1, rate=-1), "a.rate is -1; expected a number above 0"),
        (Outer(1, slow=-1), "a.slow is -1; expected a number above 0"),
    ],
)
def test_what_it_does_not_take_is_one_line(changed, message):
    with pytest.raises(ConfigError) as error:
        check(changed, "a.")
    assert str(error.value) == message
