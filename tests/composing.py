"""Compose configurations with less work: hydra parses all yaml of conf/ again for each of them, and tests make many."""

from __future__ import annotations

import pickle
from pathlib import Path

from hydra._internal.config_repository import ConfigRepository

from tessera import conf

ALWAYS_THERE = {f"file://{Path(conf.__file__).parent.resolve()}", "pkg://hydra.conf", "structured://"}


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
