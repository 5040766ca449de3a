"""Every kind of page in a real browser: no complaint in the console, light and dark, on a phone, and as PDF.

The pictures are left in the folder that pytest makes for the module (--basetemp chooses where).
"""

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tessera.ctr.report.comparison import compare_runs
from tessera.ctr.report.days import write_index
from tessera.ctr.report.report import write_report
from tests.ctr.report.daily_folder import HELD, make_daily_run
from tests.ctr.report.run_folder import make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
PAGES = ("run", "day", "index", "comparison")
PHONES = (320, 390)
# Each page in frames as wide as a phone; the title then holds the width that its content takes in each.
FRAMES = """<!doctype html><title></title>{frames}<script>
addEventListener("load", () => {{ document.title = "widths " + [...document.querySelectorAll("iframe")].map(
  frame => frame.contentDocument.documentElement.scrollWidth).join(" ") }})
</script>"""


@pytest.fixture(scope="module")
def browser():
    for name in filter(shutil.which, BROWSERS):
        # On some systems the name is there and only tells how to install the browser.
        if subprocess.run([name, "--version"], capture_output=True, timeout=60).returncode == 0:
            return name
    pytest.skip("no Chromium on this machine to render the pages with")


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "a-run-with-quite-a-long-name-as-they-are-made-from-model-and-data", rows=4000)
    write_report(run)
    daily = make_daily_run(folder / "daily", rows=1000, reports=[HELD - 1, HELD, HELD + 1])
    write_index(daily)
    other = make_daily_run(folder / "daily-with-less-noise", rows=1000, noise=0.4)
    comparison = compare_runs(daily, other, folder / "comparison", replicates=200)
    return {
        "run": run / "report.html",
        "day": daily / "days" / f"2026-01-{3 + HELD:02d}" / "report.html",
        "index": daily / "index.html",
        "comparison": comparison.folder / "comparison.html",
    }


def open_page(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess:
    profile = page.with_suffix(".profile")
    command = [browser, *OPTIONS, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


# Pages share colours and rules: each in one scheme, each second one on paper; the rest are slow tests.
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(name, scheme, marks=[pytest.mark.slow] if (place + alternate) % 2 else [])
        for place, name in enumerate(PAGES)
        for alternate, scheme in enumerate(("dark", "light"))
    ],
)
def test_the_console_is_silent_and_the_colours_are_those_asked_for(pages, browser, name, scheme):
    picture = pages[name].with_name(f"{name}-{scheme}.png")
    preferred = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    done = open_page(browser, pages[name], preferred, f"--screenshot={picture}", "--window-size=1100,2400")
    assert picture.is_file(), done.stderr
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (2400, 1100, 3)
    background, ink = pixels[5, 5].mean(), pixels[:200].mean(2)
    assert (background < 0.2 and ink.max() > 0.8) if scheme == "dark" else (background > 0.9 and ink.min() < 0.3)
    # Something is drawn all the way down, in colours and not in greys alone.
    assert all(np.ptp(part) > 0.3 for part in np.array_split(pixels.mean(2), 4))
    assert (np.ptp(pixels, axis=2) > 0.3).mean() > 0.001


def test_no_page_is_wider_than_a_phone(pages, browser, tmp_path):
    frame = '<iframe srcdoc="{}" style="width:{}px;height:800px;border:0"></iframe>'
    texts = [(page.read_text(), width) for page in pages.values() for width in PHONES]
    frames = "".join(frame.format(html.escape(text), width) for text, width in texts)
    (tmp_path / "frames.html").write_text(FRAMES.format(frames=frames))
    done = open_page(browser, tmp_path / "frames.html", "--dump-dom", "--virtual-time-budget=20000")
    widths = re.search(r"<title>widths ([\d ]+)</title>", done.stdout)
    assert widths, done.stdout[:500]
    assert [int(width) for width in widths[1].split()] == list(PHONES) * len(pages)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("day", "index") else []) for name in PAGES]
)
def test_it_prints(pages, browser, name):
    paper = pages[name].with_suffix(".pdf")
    done = open_page(browser, pages[name], "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    assert paper.is_file(), done.stderr
    content = paper.read_bytes()
    assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
    sheets = len(re.findall(rb"/Type\s*/Page\b", content))
    assert 2 <= sheets <= 12 and len(content) > 20_000
