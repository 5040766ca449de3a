"""What PyYAML raises for a text that is no YAML: 2024-13-45 is a date to it, and not one of its own errors."""

from __future__ import annotations

import yaml

#: Nesting that is too deep ends in RecursionError, `!!int ''` in IndexError, a date that is none in ValueError.
NOT_YAML = (yaml.YAMLError, ValueError, IndexError, RecursionError)


def first_line(error: BaseException) -> str:
    """Return what an error says on its first line; what kind it is if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
