"""Compose configurations with less work: tests make thousands, most of them as another one but for its folders.

Hydra parses all yaml of conf/ again for each, merges it and has types checked, a quarter of what a small job takes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository

from tessera import conf
from tessera.ctr import config as configuration
from tests import COMPOSED

ALWAYS_THERE = {f"file://{Path(conf.__file__).parent.resolve()}", "pkg://hydra.conf", "structured://"}
FOLDER = re.compile(r"(?P<key>[a-z_.]+=)(?P<path>/[\w./-]+)", re.ASCII)


def parse_once() -> None:
    """Keep what is parsed in this process. Folders of a test's own are read each time."""
    load, kept = ConfigRepository.load_config, {}

    def load_once(repository: ConfigRepository, config_path: str):
        if not {source.full_path() for source in repository.sources} <= ALWAYS_THERE:
            return load(repository, config_path)
        if config_path not in kept:
            kept[config_path] = pickle.dumps(load(repository, config_path))
        return pickle.loads(kept[config_path])

    ConfigRepository.load_config = load_once


def compose_once() -> None:
    """Keep each configuration that is composed, for all processes of this run of pytest.

    A command line that differs from an earlier one only in folders is that one with other folders, whose names no key
    but their own depends on. What is refused is composed again each time.
    """
    compose, shared = configuration.config_of, Path(os.environ.get(COMPOSED, os.devnull))

    def compose_or_read(options: argparse.Namespace) -> configuration.Config:
        if options.config_dir or options.cfg or not shared.is_dir():
            return compose(options)
        folders: list[str] = []
        keyed = [_without_folder(one, folders) for one in options.overrides]
        path = shared / hashlib.sha256(repr(keyed).encode()).hexdigest()
        if not path.exists():
            given = options.overrides
            options.overrides = keyed
            try:
                made = compose(options)
            except Exception:
                if not folders:
                    raise
                options.overrides = given
                return compose(options)
            with tempfile.NamedTemporaryFile(dir=shared, delete=False) as file:
                pickle.dump(made, file)
            os.replace(file.name, path)
        return _with_folders(pickle.loads(path.read_bytes()), folders)

    configuration.config_of = compose_or_read


def check_no_export() -> None:
    """Have no job export its model before the first step unless it says `export.check`: a second of each. What users
    get is the default, which tests of the check take."""
    compose = configuration.config_of

    def compose_unchecked(options: argparse.Namespace) -> configuration.Config:
        made = compose(options)
        if not any(one.startswith("export.check=") for one in options.overrides):
            made.export.check = "never"
        return made

    configuration.config_of = compose_unchecked


def _without_folder(override: str, folders: list[str]) -> str:
    found = FOLDER.fullmatch(override)
    if found is None:
        return override
    folders.append(found["path"])
    return f"{found['key']}/folder-{len(folders) - 1}-of-a-test"


def _with_folders(value: Any, folders: list[str]) -> Any:
    if isinstance(value, str):
        return re.sub(r"/folder-(\d+)-of-a-test", lambda found: folders[int(found[1])], value)
    if is_dataclass(value):
        for field in fields(value):
            setattr(value, field.name, _with_folders(getattr(value, field.name), folders))
    elif isinstance(value, dict):
        return {key: _with_folders(one, folders) for key, one in value.items()}
    elif isinstance(value, list):
        return [_with_folders(one, folders) for one in value]
    return value
