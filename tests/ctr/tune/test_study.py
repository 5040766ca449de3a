"""A search: trials follow from the seed, one that is stopped goes on as one that was not, and the page says it all."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from tessera.ctr.report.tune_page import write_tune_report
from tessera.ctr.tune import study
from tessera.ctr.tune.space import Choices, Range
from tessera.ctr.tune.study import JOURNAL, Search, TuneSettings
from tessera.ctr.tune.trial_run import TrialFailed, evaluations_of, run_trial
from tessera.embedding.errors import ConfigError, TesseraError
from tests.ctr.report.html_page import Page

SPACE = {"lr": Range(0.01, 1.0, log=True), "n": Range(1, 4, whole=True), "kind": Choices(("a", "b"))}
SETTINGS = TuneSettings(("x=1",), SPACE, "auc", higher_is_better=True)
GIVEN = {"lr": 0.02, "n": 2, "kind": "a"}


class Stopped(BaseException):
    """A search is killed."""


def quality(values: dict[str, str]) -> float:
    return 0.9 - abs(float(values["lr"]) - 0.3) - 0.001 * int(values["n"]) - 0.05 * (values["kind"] == "a")


class Trainer:
    """In place of processes: two evaluations, of which the second is the better one."""

    def __init__(self, monkeypatch, kill_at: int | None = None, fail: tuple[int, ...] = ()) -> None:
        self.calls, self.kill_at, self.fail = [], kill_at, fail
        self.found: dict[str, list[float]] = {}
        monkeypatch.setattr(study, "run_trial", self.run)
        monkeypatch.setattr(study, "evaluations_of", lambda folder, metric: self.found.get(folder.name, []))

    def run(self, launcher, overrides, folder, metric, watch) -> bool:
        self.calls.append((folder.name, tuple(overrides)))
        if int(folder.name[-4:]) in self.fail:
            raise TrialFailed("out of luck")
        value = quality(dict(one.split("=") for one in overrides))
        self.found[folder.name] = [value - 0.05]
        if watch(self.found[folder.name]):
            return False
        if int(folder.name[-4:]) == self.kill_at:
            self.kill_at = None
            raise Stopped
        self.found[folder.name].append(value)
        return not watch(self.found[folder.name])


def searched(folder: Path, trials: int, settings: TuneSettings = SETTINGS) -> Search:
    folder.mkdir(exist_ok=True)
    search = Search(folder, settings, GIVEN)
    search.run(trials, "python", lambda _: None)
    return search


def without_times(search: Search) -> list:
    return [(one.number, one.state, one.value, one.values, one.evaluations) for one in search.results()]


def test_a_search_finds_better_settings_and_ends_bad_trials(tmp_path, monkeypatch):
    Trainer(monkeypatch)
    search = searched(tmp_path, 20)
    results, best = search.results(), search.best()
    assert results[0].values == GIVEN, "the settings as given come first"
    assert best.value > results[0].value and best.values["kind"] == "b"
    assert {one.state for one in results} == {"complete", "pruned"}
    assert all(len(one.evaluations) == 1 for one in results if one.state == "pruned" and one.number < 8)
    importance = search.importance()
    assert set(importance) == set(SPACE) and abs(sum(importance.values()) - 1) < 1e-9
    assert min(importance, key=importance.get) != "lr"


def test_a_search_that_is_killed_goes_on_as_one_that_was_not(tmp_path, monkeypatch):
    Trainer(monkeypatch)
    whole = without_times(searched(tmp_path / "a", 9))
    trainer = Trainer(monkeypatch, kill_at=7)
    with pytest.raises(Stopped):
        searched(tmp_path / "b", 9)
    assert without_times(searched(tmp_path / "b", 9)) == whole
    assert [name for name, _ in trainer.calls].count("trial-0007") == 2
    assert trainer.calls[7] == trainer.calls[8], "the same run goes on, in its folder"
    for line in (tmp_path / "b" / JOURNAL).read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
def test_more_trials_of_an_earlier_search(tmp_path, monkeypatch):
    Trainer(monkeypatch)
    whole = without_times(searched(tmp_path / "a", 6))
    searched(tmp_path / "b", 3)
    assert without_times(searched(tmp_path / "b", 6)) == whole


def test_another_search_in_the_folder_is_refused(tmp_path, monkeypatch):
    Trainer(monkeypatch)
    searched(tmp_path, 1)
    for other, key in (
        (TuneSettings(("x=2",), SPACE, "auc", higher_is_better=True), "overrides"),
        (TuneSettings(("x=1",), {**SPACE, "n": Range(1, 5, whole=True)}, "auc", higher_is_better=True), "space"),
        (TuneSettings(("x=1",), SPACE, "auc", higher_is_better=True, seed=1), "seed"),
    ):
        with pytest.raises(ConfigError, match=f"was begun with other {key}: .*; expected the same command"):
            Search(tmp_path, other, GIVEN)


def test_trials_may_fail_but_not_the_first_nor_three_in_a_row(tmp_path, monkeypatch):
    Trainer(monkeypatch, fail=(2, 4))
    results = searched(tmp_path / "a", 6).results()
    assert [one.number for one in results if one.state == "failed"] == [2, 4] and results[2].why == "out of luck"
    Trainer(monkeypatch, fail=(0,))
    with pytest.raises(TesseraError, match="the first trial failed: out of luck"):
        searched(tmp_path / "b", 6)
    Trainer(monkeypatch, fail=(1, 2, 3))
    with pytest.raises(TesseraError, match="trial 3 and the 2 before it failed: out of luck"):
        searched(tmp_path / "c", 6)


def test_the_page_has_the_best_line_and_asks_no_network(tmp_path, monkeypatch):
    Trainer(monkeypatch, fail=(3,))
    search = searched(tmp_path, 14, TuneSettings(("x=1",), SPACE, "auc", higher_is_better=True, prune=False))
    line = "lr=0.3 'kind=<b>'"
    write_tune_report(tmp_path, "auc", search.results(), search.best(), line, search.importance(), 14)
    text = (tmp_path / "report.html").read_text()
    assert not Page(text).fetched
    assert "lr=0.3 &#39;kind=&lt;b&gt;&#39;" in text and "failed: out of luck" in text
    assert "Importance of settings" in text and "14 of 14 trials: 13 complete, 1 failed." in text
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["best"] == search.best().number and len(told["trials"]) == 14 and told["line"] == line
    assert (tmp_path / "best.txt").read_text() == line + "\n"


def test_a_page_without_a_trial_that_ended(tmp_path):
    write_tune_report(tmp_path, "auc", [], None, None, None, 5)
    assert "No trial ran to its end yet." in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "best.txt").exists()


RUN = """
import json, pathlib, sys, time
folder = pathlib.Path(next(one for one in sys.argv if one.startswith("trainer.run_dir=")).partition("=")[2])
if "fail" in sys.argv:
    print("a trace", file=sys.stderr)
    sys.exit("error: no luck")
for step in (1, 2):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "eval", "split": "valid", "step": step, "auc": 0.5 + step}) + "\\n")
with open(folder / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"kind": "eval", "split": "valid", "step": 2, "model": "best", "auc": 9}) + "\\n")
time.sleep(100 if "wait" in sys.argv else 0)
"""


def test_a_run_is_followed_ended_and_its_last_word_kept(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    launcher = f"{sys.executable} {tmp_path}/run.py"
    assert run_trial(launcher, [], tmp_path / "a", "auc", lambda found: False)
    assert evaluations_of(tmp_path / "a", "auc") == [1.5, 2.5]
    assert not run_trial(launcher, ["wait"], tmp_path / "b", "auc", lambda found: found == [1.5, 2.5])
    with pytest.raises(TrialFailed, match=r"^error: no luck$"):
        run_trial(launcher, ["fail"], tmp_path / "c", "auc", lambda found: True)
