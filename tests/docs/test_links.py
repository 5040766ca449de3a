"""Every link between pages leads somewhere, and every file that a page names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, names, prose

LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)|(?:src|href)=\"(?P<html>[^\"]+)\"")
FILE = re.compile(r"(?<![\w/.:-])(?:[\w-]+/)+[\w.-]+\.(?:py|yaml|yml|sh|txt|md|toml|cpp|h)\b(?:::\w+)?")
LAYERS = "ctr|distributed|embedding|kernels|conf|scripts"
TESTS = re.compile(r"::(test_\w+)")
#: Folders in which a page may leave out what stands before: `daily/test_life.py` is below tests/ctr.
BELOW = ("", "tests", "tests/ctr", "scripts", "docs")
#: Files that a page has the reader make, or a command write.
MADE = re.compile(r"nfm|mine|my_|/NAME|\.\./|^[A-Z]+/|^runs/")


def links(text: str) -> list[str]:
    found = [match["target"] or match["html"] for match in LINK.finditer(prose(text))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        if not goal.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(goal.read_text()):
            found.append(f"{target}: no such heading")
    return found


def absent(text: str) -> list[str]:
    """The files, and tests in files, that a page names and that are not there."""
    found = []
    for name in sorted({match[0] for match in FILE.finditer(text)}):
        path, _, test = name.partition("::")
        places = [ROOT / folder / path for folder in BELOW if (ROOT / folder / path).is_file()]
        if MADE.search(path):
            continue
        if not places:
            found.append(path)
        elif test and f"def {test}(" not in places[0].read_text():
            found.append(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    assert not broken(page, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_are_there(page):
    assert not absent(page.read_text())


def test_tests_that_are_named_alone_are_there():
    """A table may name several tests of one file: `x/test_y.py::test_a`, `::test_b`."""
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        known |= set(re.findall(r"def (test_\w+)\(", path.read_text()))
    named = {name: page.name for page in PAGES for name in TESTS.findall(page.read_text())}
    assert not {f"{page}: {name}" for name, page in named.items() if name not in known}


def test_what_leads_nowhere_is_found():
    page = ROOT / "docs" / "data.md"
    text = "[a](tables.md) [b](table.md) [c](tables.md#no-such) [d](#features) [e](https://x.org/y) [f](../README.md)"
    assert broken(page, text + "\n## Features") == ["table.md: no such file", "tables.md#no-such: no such heading"]
    assert absent("`docs/data.md` and conf/nowhere.yaml, docs/test_links.py::test_no") == [
        "conf/nowhere.yaml",
        "docs/test_links.py::test_no",
    ]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_modules_that_are_named_are_there(page):
    """`tessera.a.b.C` in a page is a module, or a name in one."""
    named = set(re.findall(rf"\btessera\.(?:{LAYERS})(?:\.\w+)*", page.read_text()))
    gone = [name for name in named if not MADE.search(name) and not _is_in_source(name.split(".")[1:])]
    assert not gone


def _is_in_source(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    source = module if module.is_file() else path.parent / "__init__.py"
    return source.is_file() and re.search(rf"^(?:class|def) {parts[-1]}\b|^{parts[-1]}\b", source.read_text(), re.M)
