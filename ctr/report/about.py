"""Read the description of a run from its folder: model and data, configuration, plan, versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from tessera.ctr.data.errors import DataError
from tessera.ctr.report.files import read_text
from tessera.ctr.yaml_errors import NOT_YAML, first_line

PACKAGES = ("torch", "torchrec", "pyarrow", "numpy", "matplotlib")


@dataclass(frozen=True)
class Text:
    title: str
    body: str


def texts(folder: Path) -> list[Text]:
    """Return the sharding plan and the resolved configuration, those that exist."""
    found = [("Sharding plan", read_text(folder / "plan.txt")), ("Resolved configuration", read_text(_config(folder)))]
    return [Text(title, body) for title, body in found if body]


def _config(folder: Path) -> Path:
    return folder / "config.yaml"


def subtitle(folder: Path) -> str:
    """Return `deepfm on criteo`, as far as the configuration tells."""
    path = _config(folder)
    try:
        loaded = yaml.safe_load(read_text(path))
    except NOT_YAML as error:
        raise DataError(f"{path}: not YAML: {first_line(error)}") from None

    def key(group: str, name: str) -> str:
        section = loaded.get(group) if isinstance(loaded, dict) else None
        return str(section.get(name) or "") if isinstance(section, dict) else ""

    model = key("model", "name") or key("model", "target").rpartition(".")[2]
    return " on ".join(name for name in (model, key("data", "name")) if name)


def versions(folder: Path) -> dict[str, str]:
    """Return package versions as the run recorded them, or those of this environment if it did not."""
    path = folder / "versions.json"
    text = read_text(path)
    if text:
        try:
            return {str(name): str(version) for name, version in json.loads(text).items()}
        except (json.JSONDecodeError, AttributeError):
            raise DataError(f"{path}: expected a JSON object of package and version") from None
    return installed_versions(PACKAGES)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
