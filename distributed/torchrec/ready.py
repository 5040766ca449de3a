"""Results that need not be waited for, in torchrec's form."""

from __future__ import annotations

from typing import TypeVar

from torchrec.distributed.types import Awaitable

T = TypeVar("T")


class Ready(Awaitable[T]):
    """As torchrec's `NoWait`, without a mark in a profile, which takes time."""

    def __init__(self, value: T) -> None:
        self._value = value

    def wait(self) -> T:
        return self._value

    def _wait_impl(self) -> T:
        return self._value
