"""The command `tessera`: one word for each script of this folder, which is imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from tessera.distributed.threads import let_idle_threads_sleep
from tessera.embedding.errors import did_you_mean

#: word -> module of this folder, what it is for
COMMANDS = {
    "train": ("train", "train a model, from parquet to report"),
    "daily": ("daily", "retrain day by day and publish"),
    "evaluate": ("evaluate", "score a data set with a trained run"),
    "score": ("score", "predict for rows without labels"),
    "importance": ("importance", "rank the fields of a trained run"),
    "select-interactions": (
        "select_interactions",
        "search which pairs of fields to memorise, to multiply, to leave out",
    ),
    "export": ("export", "make one folder that serves a model without the system that trained it"),
    "serve": ("serve", "serve an export over HTTP, up to date with what is published"),
    "plan": ("plan", "bytes, traffic and time of a job on 1 to 1,024 ranks, before it runs"),
    "prepare": ("prepare", "make a data set from Criteo, Avazu, MovieLens, any CSV, or synthetic"),
    "report": ("report", "write the report of a run again"),
    "compare": ("compare", "is one run better than another, with intervals"),
    "sweep": ("sweep", "train a grid of settings with several seeds, one table"),
    "tune": ("tune", "search for better settings, guided by the valid split"),
    "find-lr": ("find_lr", "find learning rates by short runs in which they grow"),
    "inspect": ("inspect_checkpoint", "what saved states hold, and whether they are whole"),
    "apply-delta": ("apply_delta", "bring a copy of the published model up to date"),
    "convert-tables": ("convert_tables", "store the rows of a run in another format"),
    "doctor": ("doctor", "check the installation"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tessera WORD ...` and return its exit status: 2 for a mistake on the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "_ARGCOMPLETE" in os.environ:
        return _complete()
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"tessera {metadata.version('tessera-ctr')}")
        return 0
    word, *rest = given
    if word not in COMMANDS:
        hint = did_you_mean(word, COMMANDS, f"expected one of {', '.join(COMMANDS)}", form="{}")
        print(f"error: tessera has no command {word!r}{hint}", file=sys.stderr)
        return 2
    sys.argv[0] = f"tessera {word}"  # as argparse shows it
    let_idle_threads_sleep()  # before a script loads torch
    return _script(word).main(rest)


def _script(word: str) -> Any:
    return importlib.import_module(f"tessera.scripts.{COMMANDS[word][0]}")


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {word:{width}}{purpose}" for word, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tessera COMMAND ...",
            "",
            *lines,
            "",
            "tessera COMMAND --help shows its options; for train and daily also models, data sets and all keys.",
            "On several ranks: torchrun --nproc-per-node 2 -m tessera.scripts.train ...",
            "--version prints the version.",
        ]
    )


def _complete() -> int:
    """Answer a shell that asks what could stand next: `eval "$(register-python-argcomplete tessera)"`."""
    import argparse

    import argcomplete

    parser = argparse.ArgumentParser(prog="tessera")
    words = parser.add_subparsers()
    typed = os.environ.get("COMP_LINE", "").split()
    for word, (_, purpose) in COMMANDS.items():
        if len(typed) > 1 and typed[1] == word:  # the others are not worth their imports
            known = _parser_of(word)
            words.add_parser(word, parents=[known], add_help=False, conflict_handler="resolve")
        else:
            words.add_parser(word, help=purpose)
    argcomplete.autocomplete(parser, always_complete_options=False)
    return 0


def _parser_of(word: str) -> Any:
    if word not in ("train", "daily"):
        return _script(word).make_parser()
    from tessera.ctr.config import Config, config_parser
    from tessera.ctr.config_help import choices, keys_by_group

    parser = config_parser("")
    words = [f"{group}={name}" for group, names in choices().items() for name in names]
    words += [f"{group}.{name}=".lstrip(".") for group, names in keys_by_group(Config).items() for name in names]
    (overrides,) = (action for action in parser._actions if action.dest == "overrides")
    vars(overrides)["completer"] = lambda **_: words  # the attribute that argcomplete looks for
    return parser


if __name__ == "__main__":
    sys.exit(main())
