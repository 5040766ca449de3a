"""Search for better settings of a model: train again and again with values of a space, guided by the valid split.

`tessera tune --output tunes/a --trials 30 -- model=deepfm data=ml100k data.path=.. trainer.epochs=5` takes the space of
the model from conf/tune, or that of --space. Trial 0 has the settings as given. Trials that fall behind the median of
the others at an evaluation end there. The metric is trainer.early_stop.metric on the valid split; the test split is
not read. Start the same command again to go on, with a larger --trials for more. docs/tune.md says what comes out.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tessera.distributed.process import run_alone
from tessera.embedding.errors import ConfigError

if TYPE_CHECKING:
    from tessera.ctr.config import Config
    from tessera.ctr.report.trial_result import TrialResult


def main(arguments: Sequence[str] | None = None) -> int:
    return run_alone(lambda: tune(make_parser().parse_args(arguments)))


def tune(options: argparse.Namespace) -> None:
    """Run what is missing of the search in `options.output`, and write its report after every trial.

    Raises:
        ConfigError: Optuna is not here, or a mistake in the space, the overrides or the output; nothing has been
            trained then.
        TesseraError: trials fail one after the other.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tessera tune needs optuna: pip install tessera-ctr[tune]")
    from tessera.ctr.config import load_config
    from tessera.ctr.data.labels import labels_of
    from tessera.ctr.metrics.steering import higher_is_better
    from tessera.ctr.output_folders import claim
    from tessera.ctr.report.tune_page import write_tune_report
    from tessera.ctr.tune.space import as_given, overrides_of, read_space, space_of
    from tessera.ctr.tune.study import Search, TuneSettings
    from tessera.distributed.folder_lock import FolderLock

    if options.trials < 1:
        raise ConfigError(f"--trials is {options.trials}; expected 1 or more")
    overrides = list(options.overrides)
    config = load_config(overrides, "")
    _check(config)
    where, entries = read_space(options.space or _space_of_model(config))
    space = space_of(where, entries, overrides)
    metric = config.trainer.early_stop.metric
    higher = higher_is_better(labels_of(config.data.schema.labels), metric)
    claim(options.output, "--output", "tune.py", [config.data.path])
    shared = (*overrides, "data.test=null", "trainer.checkpoint.keep_last=1")
    settings = TuneSettings(shared, space, metric, higher, options.seed, prune=not options.no_pruning)
    lock = FolderLock(options.output)
    signal.signal(signal.SIGTERM, _interrupt)  # the run of the trial is asked to save its state
    try:
        search = Search(options.output, settings, as_given(space, config))

        def told(trial: TrialResult | None) -> None:
            best = search.best()
            line = None if best is None else " ".join(shlex.quote(one) for one in overrides_of(best.values))
            results, importance = search.results(), search.importance()
            write_tune_report(options.output, metric, results, best, line, importance, options.trials)
            if trial is not None:
                print(_said(trial, metric), flush=True)

        search.run(options.trials, options.launcher, told)
        told(None)
        if best := search.best():
            line = " ".join(shlex.quote(one) for one in overrides_of(best.values))
            print(f"best {metric} {best.value:.5f}, trial {best.number}: {line}")
        print(f"report: {options.output}/report.html")
    finally:
        lock.release()


def _check(config: Config) -> None:
    if config.data.valid is None:
        raise ConfigError("data.valid is null; expected a split, by which trials are compared")
    for key, value in {
        "trainer.run_dir": config.trainer.run_dir,
        "trainer.resume": config.trainer.resume,
        "trainer.checkpoint.folder": config.trainer.checkpoint.folder,
    }.items():
        if value is not None:
            raise ConfigError(f"{key} is {value}; expected none, as each trial has a folder of its own in --output")


def _space_of_model(config: Config) -> str:
    """Return the name of the space that belongs to a model of conf/model; of another one the user names a space."""
    from tessera.ctr.config_help import choices
    from tessera.ctr.tune.space import SHIPPED

    target = str(config.model.get("target", ""))
    module = target.split(".")[-2] if target.startswith("tessera.ctr.models.") else ""
    if module in choices()["model"] and (SHIPPED / f"{module}.yaml").is_file():
        return module
    raise ConfigError(f"model.target is {target}, which has no space in conf/tune; expected --space FILE")


def _said(trial: TrialResult, metric: str) -> str:

    value = "" if trial.value is None else f" · {metric} {trial.value:.5f}"
    why = f" · {trial.why}" if trial.why else ""
    settings = " ".join(
        f"{key}={one:.4g}" if isinstance(one, float) else f"{key}={one}" for key, one in trial.values.items()
    )
    return f"trial {trial.number} · {trial.state}{value} · {settings}{why}"


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trials and the report")
    parser.add_argument("--trials", type=int, default=30, help="in all, earlier ones included (default: %(default)s)")
    parser.add_argument("--space", help="a yaml of your own, or the name of one of conf/tune (default: the model's)")
    parser.add_argument("--seed", type=int, default=2026, help="of the search (default: %(default)s)")
    parser.add_argument("--no-pruning", action="store_true", help="let every trial run to its end")
    parser.add_argument("--launcher", default=sys.executable, help='for ranks: "torchrun --nproc-per-node 2"')
    parser.add_argument("overrides", nargs="*", help="after --: what all trials share")
    return parser


if __name__ == "__main__":
    sys.exit(main())
