"""The pages that people write, and what the tests look for in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\n(?P<body>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


def names(paths: list[Path]) -> list[str]:
    """Paths below the root, to name the cases of a test by."""
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code of a page in one language, in order."""
    return [found["body"] for found in FENCE.finditer(text) if found["language"] == language]


def anchors(text: str) -> set[str]:
    """What a link to a page may name behind `#`: its headings, as GitHub and the site write them, and ids in HTML."""
    found = set(re.findall(r'id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-"))
    return found
