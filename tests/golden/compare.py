"""What differs between the golden results of a job and those of today."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

RELATIVE = 1e-6


def differences(golden: Any, found: Any, exact: bool, where: str = "") -> list[str]:
    """Lines that say where two results differ and how; none where they agree.

    exact: compare digests and every bit of numbers. Otherwise digests are left out, and floats may differ by `RELATIVE`
    of their size; all else, whole numbers too, must be equal.
    """
    return list(_differences(golden, found, exact, where))


def _differences(golden: Any, found: Any, exact: bool, where: str) -> Iterator[str]:
    if isinstance(golden, dict) and isinstance(found, dict):
        golden, found = ({k: v for k, v in one.items() if exact or k != "bits"} for one in (golden, found))
        for key in [*golden, *(key for key in found if key not in golden)]:
            if key in golden and key in found:
                yield from _differences(golden[key], found[key], exact, f"{where}.{key}".lstrip("."))
            else:
                yield f"{where}.{key} is {'missing' if key in golden else 'new'}"
    elif isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            yield f"{where} has {len(found)} entries, golden are {len(golden)}"
        for number, pair in enumerate(zip(golden, found, strict=False)):
            yield from _differences(*pair, exact, f"{where}[{number}]")
    elif not _same(golden, found, exact):
        relative = f" (relative {abs(found - golden) / abs(golden):.1e})" if _numbers(golden, found) and golden else ""
        yield f"{where} is {found!r}, golden is {golden!r}{relative}"


def _same(golden: Any, found: Any, exact: bool) -> bool:
    if isinstance(golden, float) and isinstance(found, float) and not exact:
        return math.isclose(golden, found, rel_tol=RELATIVE)
    return type(golden) is type(found) and golden == found


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)
