"""Hooks for mkdocs (mkdocs.yml): they add pages that are made from the code, and pages from the root.

On disk docs/ holds what people write. Added here are the page of every key, the pages of the Python interface, and
README's neighbours (CONTRIBUTING.md and so on), whose links then lead to the site's own pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tessera.scripts.docs import api, commands, keys

ROOT = Path(__file__).resolve().parents[2]
#: File in the root -> its address in the site.
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()(?P<path>[\w./-]+\.md)(?=[)#])")


def on_startup(command: str, dirty: bool) -> None:  # noqa: FBT001 (mkdocs' signature)
    """Lay out the sources by their import names, before mkdocstrings looks which of its folders are there."""
    api.import_tree(ROOT / "build" / "api")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the Python interface into the navigation."""
    assert config.nav is not None
    for section in config.nav:
        for entry in next(iter(section.values())):
            if isinstance(entry, dict) and entry.get("Python") == "api":
                entry["Python"] = api.navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for address, text in generated().items():
        files.append(File.generated(config, address, content=text))
    return files


def generated() -> dict[str, str]:
    """Return address in the site -> markdown, of all pages that docs/ does not hold."""
    found = {"reference/keys.md": keys.page(), "reference/commands.md": commands.page(), **dict(api.pages())}
    for name, address in FROM_ROOT.items():
        found[address] = (ROOT / name).read_text()
    return found


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links between docs/ and the files of the root lead to pages of the site."""
    if page.file.src_uri in FROM_ROOT.values():
        return LINK.sub(lambda found: FROM_ROOT.get(found["path"], found["path"].removeprefix("docs/")), markdown)
    return LINK.sub(lambda found: _of_root(found["path"], page.file.src_uri), markdown)


def _of_root(path: str, page: str) -> str:
    """Return the link to a file of the root as one to its page; others as they are."""
    whole = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
    return posixpath.relpath(FROM_ROOT[whole], posixpath.dirname(page) or ".") if whole in FROM_ROOT else path
