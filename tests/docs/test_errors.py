"""Every error text that a page explains is one that the source can write."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.pages import ROOT

FOLDERS = ("ctr", "distributed", "embedding", "kernels", "scripts")
FAQ = (ROOT / "docs" / "faq.md").read_text()
EXPLAINED = re.findall(r"^### `(.+)`$", FAQ, re.MULTILINE)
INSTALL = (ROOT / "docs" / "install.md").read_text().partition("## When it fails")[2]
#: Said by pip, the linker or the disk.
OF_OTHERS = ("No matching distribution", "libcuda", "libnvidia", "No space left")


def templates() -> list[str]:
    """Every text in the source; `…` stands where a value is filled in."""
    found = [(ROOT / "scripts" / "setup.sh").read_text(), (ROOT / "setup.py").read_text()]
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(getattr(one, "value", "…") if _is_text(one) else "…" for one in node.values))
    return found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


TEMPLATES = templates()


def is_written(text: str) -> bool:
    """Whether some text of the source has these words, in this order, with anything where `…` stands."""
    words = [re.escape(part) for part in text.split("…")]
    wanted = re.compile(".*".join(words))
    return any(wanted.search(template) for template in TEMPLATES)


@pytest.mark.parametrize("text", EXPLAINED)
def test_the_source_writes_what_is_explained(text):
    """Where this fails, a message was changed: change its heading in docs/faq.md too."""
    assert is_written(text)


def test_the_source_writes_what_install_explains():
    column = [line.split(" | ")[0] for line in INSTALL.splitlines() if line.startswith("| `")]
    quoted = [text for cell in column for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) >= 8
    assert not [text for text in quoted if not text.startswith(OF_OTHERS) and not is_written(text)]


def test_each_is_explained_once_and_says_what_to_do():
    assert len(EXPLAINED) >= 25 and len(set(EXPLAINED)) == len(EXPLAINED)
    for part in re.split(r"^### .*$", FAQ, flags=re.MULTILINE)[1:]:
        assert len(part.partition("\n## ")[0].split()) >= 8, part


def test_what_nobody_writes_is_found():
    assert is_written("unknown key … in override …") and not is_written("unknown key … in overrides …")
    assert not is_written("the rows are sad")
