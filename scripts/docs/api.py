"""Build the pages of the Python interface: one per package, with the docstrings of its public modules.

They are found in the source tree, so that a module that is moved or new needs no entry anywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Folders of the checkout whose modules are shown, from what users call to what it stands on.
LAYERS = ("ctr", "distributed", "embedding", "kernels")
OPTIONS = """    options:
      show_root_heading: true
      show_root_full_path: true
      heading_level: 2
      members_order: source
      filters: ["!^_"]
"""


def packages() -> list[str]:
    """Return the packages that have a page, as `ctr.models`: the layers, and the folders in them."""
    found = []
    for layer in LAYERS:
        inner = sorted(path.parent.name for path in (ROOT / layer).glob("*/__init__.py"))
        found += [layer, *(f"{layer}.{name}" for name in inner)]
    return [package for package in found if public_modules(package)]


def pages() -> Iterator[tuple[str, str]]:
    """Yield (address in the site, markdown) of each page."""
    for package in packages():
        docstring = ast.get_docstring(ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()))
        lines = [f"# tessera.{package}", "", docstring or "", ""]
        for path in public_modules(package):
            name = ".".join(("tessera", *path.relative_to(ROOT).with_suffix("").parts))
            lines += [f"::: {name}", OPTIONS]
        yield f"api/{package}.md", "\n".join(lines)


def navigation() -> list[dict[str, str]]:
    """Return the entries of the site's navigation: title -> address."""
    return [{f"tessera.{package}": f"api/{package}.md"} for package in packages()]


def public_modules(package: str) -> list[Path]:
    """Return modules that have something public with a docstring: of a layer those beside its packages, of a package
    all."""
    folder = ROOT / package.replace(".", "/")
    paths = folder.glob("*.py") if package in LAYERS else folder.rglob("*.py")
    return sorted(path for path in paths if not path.name.startswith("_") and _has_public(path))


def _has_public(path: Path) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text()).body
    return any(isinstance(node, kinds) and node.name[0] != "_" and ast.get_docstring(node) for node in body)


def import_tree(folder: Path) -> None:
    """Fill a folder so that its `tessera/ctr` is the checkout's `ctr`, and so on, for tools that read sources."""
    inside = folder / "tessera"
    inside.mkdir(parents=True, exist_ok=True)
    for name in LAYERS:
        link = inside / name
        if not link.is_symlink() or link.resolve() != ROOT / name:
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / name, target_is_directory=True)
