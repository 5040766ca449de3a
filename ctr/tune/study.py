"""Search a space with Optuna, one trial after the other; all that is known stands in one journal of JSON lines, from
which the same command goes on."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from tessera.ctr.report.trial_result import TrialResult
from tessera.ctr.tune.space import Choices, Range, Space, overrides_of
from tessera.ctr.tune.trial_run import TrialFailed, evaluations_of, run_trial
from tessera.embedding.errors import ConfigError, TesseraError

JOURNAL = "trials.jsonl"
BEGUN, WHY = "begun with", "why"
FAILURES = 3  # in a row, after which the search ends
STARTUP_TRIALS = 5  # before any is pruned
FOR_IMPORTANCE = 10  # trials that ran to their end, below which importance would say nothing
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class TuneSettings:
    """What one search is: of another one the journal is refused.

    overrides: what all trials share. metric: on the valid split. seed: of the search. prune: end trials early.
    """

    overrides: tuple[str, ...]
    space: Space
    metric: str
    higher_is_better: bool
    seed: int = 2026
    prune: bool = True

    def as_json(self) -> dict[str, Any]:
        space = {key: repr(values) for key, values in self.space.items()}
        return {"overrides": list(self.overrides), "space": space, "metric": self.metric, "seed": self.seed,
                "prune": self.prune}  # fmt: skip


class Search:
    """A study in a folder, which `run` goes on with.

    Raises ConfigError: the folder holds the trials of another search.
    """

    def __init__(self, folder: Path, settings: TuneSettings, given: dict[str, Any]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder, self.settings = folder, settings
        path = str(folder / JOURNAL)
        storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
        direction = StudyDirection.MAXIMIZE if settings.higher_is_better else StudyDirection.MINIMIZE
        pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS) if settings.prune else optuna.pruners.NopPruner()
        self._study = optuna.create_study(
            storage=storage, study_name="tune", direction=direction, load_if_exists=True, pruner=pruner
        )
        self._distributions = {key: _distribution(values) for key, values in settings.space.items()}
        begun, now = self._study.user_attrs.get(BEGUN), settings.as_json()
        if begun is None:
            self._study.set_user_attr(BEGUN, now)
        elif begun != now:
            key = next(key for key in now if begun.get(key) != now[key])
            raise ConfigError(
                f"{folder} was begun with other {key}: {str(begun.get(key))[:200]}; expected the same command, or "
                "another --output"
            )
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(given)

    def run(self, trials: int, launcher: str, told: Callable[[TrialResult], None]) -> None:
        """Run trials until there are so many.

        told: of each one when it has ended.

        Raises TesseraError: the first trial failed, or FAILURES in a row.
        """
        for number in range(trials):
            known = self._study.get_trials(deepcopy=False)
            if number < len(known) and known[number].state in ENDED:
                continue
            self._study.sampler = optuna.samplers.TPESampler(seed=(self.settings.seed + 7919 * number) % 2**32)
            is_begun = number < len(known) and known[number].state == TrialState.RUNNING
            trial = Trial(self._study, known[number]._trial_id) if is_begun else self._study.ask()
            values = {key: trial._suggest(key, one) for key, one in self._distributions.items()}
            self._run(trial, values, launcher)
            self._remove_models()
            told(self.results()[number])
            self._check_failures(number)

    def _run(self, trial: Trial, values: dict[str, Any], launcher: str) -> None:
        folder = self.run_folder(trial.number)
        reported = set(trial._cached_frozen_trial.intermediate_values)

        def watch(evaluations: list[float]) -> bool:
            for at, value in enumerate(evaluations):
                if at not in reported:
                    trial.report(value, at)
                    reported.add(at)
                    if trial.should_prune():
                        return True
            return False

        overrides = [*self.settings.overrides, *overrides_of(values)]
        try:
            whole = run_trial(launcher, overrides, folder, self.settings.metric, watch)
            evaluations = evaluations_of(folder, self.settings.metric)
            if not evaluations:
                raise TrialFailed(f"{self.settings.metric} on the valid split is undefined")
        except TrialFailed as error:
            trial.set_user_attr(WHY, str(error)[:500])
            self._study.tell(trial, state=TrialState.FAIL)
            return
        if whole:
            self._study.tell(trial, self._best(evaluations))
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _check_failures(self, number: int) -> None:
        last = self.results()[max(0, number + 1 - FAILURES) : number + 1]
        if all(one.state == "failed" for one in last) and (number == 0 or len(last) == FAILURES):
            which = "the first trial" if number == 0 else f"trial {number} and the {FAILURES - 1} before it"
            raise TesseraError(f"{which} failed: {last[-1].why}")

    def _best(self, values: Sequence[float]) -> float:
        return max(values) if self.settings.higher_is_better else min(values)

    def run_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _remove_models(self) -> None:
        """Of trials that ended keep the best one's model alone: tables are large."""
        best = self.best()
        for one in self.results():
            folder = self.run_folder(one.number)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if best is None or one.number != best.number:
                shutil.rmtree(folder / "best", ignore_errors=True)

    def results(self) -> list[TrialResult]:
        """Return the trials that ended, by number."""
        return [self._result(one) for one in self._study.get_trials(deepcopy=False) if one.state in ENDED]

    def _result(self, trial: FrozenTrial) -> TrialResult:
        evaluations = [value for _, value in sorted(trial.intermediate_values.items())]
        state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state, "failed")
        best = self._best(evaluations) if evaluations else None
        value = trial.value if trial.state == TrialState.COMPLETE else best
        seconds = trial.duration.total_seconds() if trial.duration else None
        values = {key: trial.params[key] for key in self.settings.space if key in trial.params}
        return TrialResult(trial.number, state, value, values, evaluations, seconds, trial.user_attrs.get(WHY, ""))

    def best(self) -> TrialResult | None:
        """Return the best trial of those that ran to their end."""
        whole = [one for one in self.results() if one.state == "complete" and one.value is not None]
        sign = -1 if self.settings.higher_is_better else 1
        return min(whole, key=lambda one: (sign * (one.value or 0.0), one.number), default=None)

    def importance(self) -> dict[str, float] | None:
        """Return the share of each key in the differences between good trials and all (PED-ANOVA), largest first; None
        with fewer than FOR_IMPORTANCE trials that ran to their end, or where none differ."""
        if sum(one.state == "complete" for one in self.results()) < FOR_IMPORTANCE:
            return None
        try:
            evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
            found = get_param_importances(self._study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:
            print(f"importance of settings is unknown: {error}", file=sys.stderr)
            return None
        return {key: float(share) for key, share in found.items()}


def _distribution(values: Range | Choices) -> BaseDistribution:
    if isinstance(values, Choices):
        return CategoricalDistribution(values.values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(float(values.low), float(values.high), log=values.log, step=values.step)
