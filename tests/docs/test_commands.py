"""Commands and keys that a page names are those that there are."""

from __future__ import annotations

import re

import pytest

from tessera.ctr import renamed_keys
from tessera.ctr.config import ALIASES, Config
from tessera.ctr.data.schema import FeatureConfig
from tessera.ctr.overrides import keys_of
from tessera.ctr.table_settings import keys_of_table
from tessera.scripts.command import COMMANDS
from tessera.scripts.docs import commands
from tests.docs.pages import PAGES, names

#: Groups of which every key is known; those of model and numeric differ from file to file.
GROUPS = ("data", "embedding", "optimizer", "trainer", "daily", "selection")
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(GROUPS)})(?:\.[a-z_0-9]+)+(?![\w/*]|\.[a-z])")
CODE = re.compile(r"`([^`\n]+)`|^(?: {4}|```).*$", re.MULTILINE)
COMMAND = re.compile(r"(?:^ *|`|&& )tessera ([a-z][a-z-]*)", re.MULTILINE)
#: A file or an attribute that looks like a key, and a key that a message named by mistake.
OTHERS = ("data.py", "daily.py", "embedding.py", "embedding.errors", "data.seed")


def known_keys() -> set[str]:
    """All keys, and the groups that hold them."""
    known = {key for key, _ in keys_of(Config)} | {alias.rstrip("=") for alias in ALIASES}
    known |= {f"data.schema.features.{name}" for name in FeatureConfig.__dataclass_fields__}
    return known | {key.rpartition(".")[0] for key in known}


KNOWN = known_keys()


def named_keys(text: str) -> set[str]:
    code = "\n".join(match[0] for match in CODE.finditer(text))
    return {key for key in KEY.findall(code) if not key.endswith(OTHERS)}


def is_known(key: str) -> bool:
    """Also `data.days.test` and `embedding.formats.w`: keys below one that takes a mapping."""
    if key.startswith("embedding.tables."):
        return key.split(".", 3)[3] in keys_of_table()
    return key in KNOWN or key.rpartition(".")[0] in {"data.days", "embedding.formats"}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_keys_that_are_named_are_there(page):
    earlier = renamed_keys.KEYS if page.name == "CHANGELOG.md" else ()  # it says what became of them
    assert not {key for key in named_keys(page.read_text()) if not is_known(key) and key not in earlier}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_that_are_named_are_there(page):
    assert set(COMMAND.findall(page.read_text())) <= set(COMMANDS)


def test_what_is_not_there_is_found():
    text = "`trainer.epoch` `data.lanes=3` `data.days.test=2026` trainer.nothing `daily.from`\n    tessera trian x"
    assert {key for key in named_keys(text) if not is_known(key)} == {"trainer.epoch"}
    assert COMMAND.findall(text) == ["trian"]


def test_the_page_of_commands_has_the_help_of_each():
    text = commands.page()
    assert [line.removeprefix("## tessera ") for line in text.splitlines() if line.startswith("## ")] == list(COMMANDS)
    assert "usage: tessera evaluate" in text and "usage: tessera prepare criteo" in text
    assert "--slice FEATURE" in text and "scripts/" not in text.replace("tessera.scripts", "")
