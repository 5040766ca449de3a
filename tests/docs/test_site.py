"""The site builds without a warning, loads nothing from elsewhere, and opens from a disk in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ctr.report.test_browser import browser, open_page  # noqa: F401
from tests.docs.pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="requirements/docs.txt is not installed (Python 3.11 or later)")
    folder = tmp_path_factory.mktemp("docs") / "site"
    shutil.rmtree(ROOT / "build" / "api", ignore_errors=True)  # as in a clone that has built nothing yet
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_navigation(site):
    text = (site / "index.html").read_text()
    listed = set(re.findall(r'href="([\w./]+\.html)"', text))
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert pages <= listed and {"reference/keys.html", "api/ctr.models.html", "contributing.html"} <= pages


def test_nothing_is_loaded_from_elsewhere(site):
    for path in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        text = path.read_text()
        assert not re.findall(r"""(?:src=|url\(|@import |<link[^>]*href=)["']?(?:https?:)?//""", text), path


def test_docstrings_are_shown(site):
    text = (site / "api" / "ctr.models.html").read_text()
    assert "the linear part of LR" in text and "tessera.ctr.models.layers.FirstOrder" in text


def test_the_console_is_silent(site, browser):  # noqa: F811
    for page in ("index.html", "reference/keys.html", "api/kernels.html", "tables.html"):
        picture = site / page.replace("/", "-").replace(".html", ".png")
        open_page(browser, site / page, f"--screenshot={picture}")
        assert picture.stat().st_size > 10_000


def test_the_search_works_without_a_server(site, browser):  # noqa: F811
    """A page asks for itself what the reader would type, and waits for the search to answer."""
    page = site / "asks.html"
    ask = '<script>history.replaceState(null, "", "?q=expire")</script>'
    page.write_text((site / "index.html").read_text().replace("<head>", f"<head>{ask}", 1))
    done = open_page(browser, page, "--dump-dom", "--virtual-time-budget=30000")
    found = re.search(r'md-search-result__meta">\s*(\d+) matching', done.stdout)
    assert found and int(found[1]) > 3
    shutil.rmtree(site / "asks.profile", ignore_errors=True)
