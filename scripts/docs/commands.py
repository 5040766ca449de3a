"""Build the page of all commands: what `tessera WORD --help` says of each."""

from __future__ import annotations

import argparse
import os

from tessera.ctr.config import config_parser
from tessera.scripts import command, daily, train

INTRODUCTION = """# Commands

`tessera WORD …`, once `.venv` is active; what each says with `--help`, read from the code when this page is built.
`train` and `daily` take keys of the configuration, all of which are on the page of every key. On several ranks:

```sh
torchrun --nproc-per-node 2 -m tessera.scripts.train model=deepfm data=criteo data.path=/data/criteo
```
"""
#: Commands whose arguments are keys of the configuration.
OF_KEYS = {"train": train, "daily": daily}
WIDTH = "100"  # of the texts, whatever terminal the site is built in


def page() -> str:
    """Return the page as markdown."""
    parts = [INTRODUCTION]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        for word, (_, purpose) in command.COMMANDS.items():
            parts.append(f"## tessera {word}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{_help(word)}\n```\n")
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return "\n".join(parts)


def _help(word: str) -> str:
    parser = config_parser(OF_KEYS[word].__doc__ or "") if word in OF_KEYS else command._script(word).make_parser()
    shown = [parser, *_kinds(parser)]
    program = parser.prog
    for one in shown:
        one.prog = f"tessera {word}{one.prog.removeprefix(program)}"
    return "\n\n\n".join(one.format_help().partition("\nchoices, one of")[0].strip() for one in shown)


def _kinds(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of the words that may follow, as those of `tessera prepare`."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [one for choices in found for one in choices.values()]
