"""Write what a search has chosen as yaml that `tessera train` takes: a data set and a model, in a folder laid out as
conf/."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from tessera.ctr.config import Config
from tessera.distributed.atomic import write_text

CHOSEN = "chosen"  # the name of the two yaml files


def write_choices(target: Path, chosen: Config) -> list[str]:
    """Write conf/data/chosen.yaml and conf/model/chosen.yaml below a folder. Return the arguments of `tessera train`
    that take them, settings of single tables among them."""
    conf = target / "conf"
    for group, values in (("data", asdict(chosen.data)), ("model", chosen.model)):
        (conf / group).mkdir(parents=True, exist_ok=True)
        write_text(conf / group / f"{CHOSEN}.yaml", OmegaConf.to_yaml(OmegaConf.create(values)))
    arguments = ["--config-dir", str(conf), f"data={CHOSEN}", f"model={CHOSEN}"]
    if chosen.embedding.tables:
        arguments.append(f"embedding.tables={json.dumps(chosen.embedding.tables)}")
    return arguments


def command_of(arguments: list[str]) -> str:
    """Return a line for a shell."""
    return shlex.join(["tessera", "train", *arguments])
