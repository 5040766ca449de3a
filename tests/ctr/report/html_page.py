"""What a page must be without a browser: closed elements, ids that are there once, nothing fetched from elsewhere."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that elements close in order; collects ids, references, links, and what is fetched from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.fetched, self.links, self.tags = [], [], [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name == "href" and value.startswith("#"):
                self.references.append(value[1:])
            elif name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("href", "src", "srcset", "data", "xlink:href") and value != "data:,":
                self.fetched.append(value)
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(html: str) -> Page:
    """Stands alone, is well-formed, and has headings in order, named tables and described plots."""
    page = Page(html)
    assert page.fetched == [] and "://" not in html and "<script" not in html and "@import" not in html
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(one["scope"] for tag, one in page.tags if tag == "th")
    regions = [one for tag, one in page.tags if one.get("role") == "region"]
    assert len(regions) >= html.count("<table>") and all(one["aria-label"] for one in regions)
    plots = [one for tag, one in page.tags if tag == "svg"]
    assert all(one["role"] == "img" and len(one["aria-label"]) > 20 for one in plots)
    for figure in re.findall("<figure>.*?</figure>", html, re.DOTALL):
        assert "<figcaption>" in figure and "<table>" in figure
    for plot in re.findall("<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", plot)
    return page
