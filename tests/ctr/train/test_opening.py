"""To open a folder of states, a run or a publication runs nothing that somebody put there, by any command."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.instantiate import is_own
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.stored_config import read_config
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.saved.manifest import MANIFEST, TRAINING
from tessera.distributed.saved.states import folder_name
from tessera.embedding.errors import ConfigError, TesseraError
from tests.ctr.daily.days import command as daily_command
from tests.ctr.daily.days import write_days
from tests.ctr.test_renamed_keys import of_version_0_1
from tests.ctr.train.states import arguments, newest, write_data
from tests.distributed.crafted import mutations, pickled, reseal, write_manifest
from tests.ranks import PYTHONPATH, ROOT, on_ranks, run_script

MINE = "tests.ctr.train.foreign.Mine"
SMALL = ["trainer.batch_size=100", "embedding=dynamic", "trainer.max_steps=6", "trainer.checkpoint.every=3"]


def script(name: str, *options: object):
    return run_script(f"scripts/{name}.py", *map(str, options))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with two states and a model, and a run over two days with its publications."""
    root = tmp_path_factory.mktemp("opening")
    write_data(root / "data", 800)
    write_days(root / "days", 2, 100)
    done = script("train", *arguments(root / "data", root / "run", *SMALL))
    assert done.returncode == 0, done.stderr
    done = script("daily", *daily_command(root / "days", root / "daily", "embedding=dynamic", "daily.full_every=2"))
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def crafted(made, tmp_path, monkeypatch) -> Path:
    """A copy of both, and a marker that is written by whatever runs."""
    for name in ("run", "daily"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.setenv("TESSERA_TEST_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    return tmp_path


def train(made: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(made / "data", run_dir, *SMALL, *more)


def commands(made: Path, at: Path) -> dict[str, tuple]:
    """Everything that opens what others may have made; each writes to a place of its own."""
    run, daily = at / "run", at / "daily"
    teacher = ["trainer.distil.kind=batch", f"trainer.distil.teacher={run}"]
    return {
        "evaluate": ("evaluate", run, "--split", "valid", "--output", at / "scored"),
        "convert": ("convert_tables", run, at / "converted", "format=fp16"),
        "teacher": ("train", *train(made, at / "taught", *teacher)),
        "warm start": ("train", *train(made, at / "warm", f"trainer.warm_start.path={run}")),
        "warm start of a model": ("train", *train(made, at / "warm2", f"trainer.warm_start.path={run / 'best'}")),
        "resume": ("train", *train(made, run, "trainer.resume=auto", "trainer.max_steps=7")),
        "resume from": ("train", *train(made, at / "other", f"trainer.resume={run}")),
        "daily": ("daily", *daily_command(made / "days", daily, "embedding=dynamic", "daily.full_every=2")),
        "roll back": ("daily", *daily_command(made / "days", daily, "daily.rollback_to=2026-01-01")),
        "apply": ("apply_delta", daily / "published", at / "served"),
        "inspect": ("inspect_checkpoint", run),
        "inspect a model": ("inspect_checkpoint", run / "best"),
    }


REPORTS = {"report": ("report", "run"), "compare": ("compare", "run", "run")}


def states_below(at: Path) -> list[Path]:
    return sorted(path.parent for path in at.rglob(MANIFEST))[::-1]  # the models in states first


def as_before(state: Path, marker: Path) -> None:
    """As the version before wrote it, with a pickle that a reader of that version would run."""
    (state / "dense" / ".metadata").write_bytes(pickled(marker))
    reseal(state, "dense/.metadata")
    write_manifest(state, json.loads((state / MANIFEST).read_text()) | {"format": 1})


def test_what_an_earlier_version_has_written_is_opened(made, crafted):
    """With its names of keys, in run folders and in states."""
    for path in crafted.glob("*/config.yaml"):
        path.write_text(OmegaConf.to_yaml(of_version_0_1(OmegaConf.to_container(OmegaConf.load(path)))))
    states = [crafted / "run" / "best", *crafted.glob("*/checkpoints/step-*")]
    assert len(states) >= 3
    for state in states:
        training = json.loads((state / TRAINING).read_text())
        if "config" in training:
            training["config"] = of_version_0_1(training["config"])
        (state / TRAINING).write_text(json.dumps(training))
        reseal(state, TRAINING)
    for name in ("evaluate", "teacher", "warm start", "resume", "resume from", "daily"):
        done = script(*commands(made, crafted)[name])
        assert done.returncode == 0, (name, done.stderr)
        assert "embedding.o" not in done.stdout + done.stderr, name  # keys that have changed are told
    assert "keep_last" in (crafted / "run" / "config.yaml").read_text()


def pickles_for_tensors(state: Path, marker: Path) -> None:
    for path in [*(state / "dense").iterdir()]:
        path.write_bytes(pickled(marker) + b" " * max(0, path.stat().st_size))
    (state / "dense" / ".metadata").write_bytes(pickled(marker))
    reseal(state, "dense/.metadata")


@pytest.mark.parametrize("craft", [as_before, pytest.param(pickles_for_tensors, marks=pytest.mark.slow)])
def test_no_command_runs_what_a_state_holds(made, crafted, craft):
    for state in states_below(crafted):
        craft(state, crafted / "marker")
    for link in crafted.rglob("latest"):  # it names publications by their checksums
        latest = json.loads(link.read_text())
        for one in latest["chain"]:
            one["checksum"] = json.loads((link.parent / one["name"] / MANIFEST).read_text())["checksum"]
        link.write_text(json.dumps(latest))
    for name, command in commands(made, crafted).items():
        done = script(*command)
        last = done.stderr.strip().splitlines()[-1:] or done.stdout.strip().splitlines()[-1:]
        expected = (1, 2) if name == "inspect" else (0, 2) if craft is pickles_for_tensors else (2,)
        assert done.returncode in expected, (name, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr + done.stdout, (name, done.stderr)
        assert not (crafted / "marker").exists(), name
        if done.returncode == 2:
            assert last[0].startswith("error: "), (name, done.stderr)


def test_a_class_that_only_a_folder_names_is_not_imported(made, crafted):
    config = crafted / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tessera.ctr.models.deepfm.DeepFM", MINE))
    reading = {name: commands(made, crafted)[name] for name in ("evaluate", "convert", "teacher")}
    for name, command in reading.items():
        done = script(*command)
        assert done.returncode == 2 and not (crafted / "marker").exists(), (name, done.stdout, done.stderr)
        assert str(config) in done.stderr and f"model.target is '{MINE}'" in done.stderr and done.stderr[-1] == "\n"
        assert f"name it on the command line: model.target={MINE}" in done.stderr, name
    for name, (what, *folders) in REPORTS.items():
        done = script(what, *(crafted / folder for folder in folders))
        assert not (crafted / "marker").exists(), (name, done.stdout, done.stderr)
    shutil.rmtree(crafted / "taught", ignore_errors=True)
    named = {"evaluate": f"model.target={MINE}", "teacher": f"trainer.distil.targets=[{MINE}]"}
    for name, option in named.items():
        what, *rest = reading[name]
        done = script(what, rest[0], option, *rest[1:])
        assert done.returncode == 0 and (crafted / "marker").exists(), (name, done.stdout, done.stderr)
        (crafted / "marker").unlink()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('model: !!python/object/apply:os.mkdir ["{}"]', "cannot be read as YAML: could not determine a constructor"),
        ("model: !!python/object/apply:pathlib.PosixPath [x]", "model is a PosixPath"),
        ("data: {{path: '${{oc.env:HOME}}'}}", r"data.path is '\$\{oc.env:HOME\}'"),
        ("data: {{path: [a, 'x ${{data.name}}']}}", r"data.path.1 is 'x \$\{data.name\}'"),
        ("numeric: {{target: subprocess.Popen, args: [touch, '{}']}}", "numeric.target is 'subprocess.Popen'"),
        ("model: {{classifier: {{target: os.system}}}}", "model.classifier.target is 'os.system'"),
        ("model: {{target: [os.system]}}", None),
        (
            "model: {{target: tessera.ctr.models.fgcnn.instantiate}}",
            "model.target is 'tessera.ctr.models.fgcnn.instantiate'",
        ),
        (
            "model: {{target: tessera.ctr.models.tower.nn.Linear}}",
            "model.target is 'tessera.ctr.models.tower.nn.Linear'",
        ),
        ("model: {{target: tessera.ctr.models.tower.nn}}", "model.target is 'tessera.ctr.models.tower.nn'"),
        ("- 1", "is no configuration of a run"),
        ("[", "cannot be read as YAML"),
        ("a: !!int ''", "cannot be read as YAML"),
        ("a: \xff", None),
    ],
)
def test_a_stored_configuration_is_data(tmp_path, line, problem):
    marker, path = tmp_path / "marker", tmp_path / "config.yaml"
    path.write_text(line.format(marker), encoding="latin-1" if "\xff" in line else "utf-8")
    with pytest.raises(ConfigError, match=problem and f"{path}.*{problem}") as error:
        run_config(tmp_path, [])
    assert "\n" not in str(error.value) and not marker.exists()


def test_every_model_of_the_project_is_its_own():
    targets = [re.search(r"^target: (\S+)", p.read_text(), re.M) for p in (ROOT / "conf").glob("*/*.yaml")]
    assert sum(found is not None for found in targets) > 15
    assert all(is_own(found[1]) for found in targets if found)
    assert is_own("ctr.models.deepfm.DeepFM")  # as version 0.1 wrote it
    assert not any(
        map(is_own, ["torch.nn.Linear", "tessera.ctr.models.deepfm", "tessera.ctr.data.schema.Schema", MINE, None, 3])
    )


def test_a_run_of_ones_own_reads_back(made):
    assert read_config(made / "run" / "config.yaml").model.target == "tessera.ctr.models.deepfm.DeepFM"
    with pytest.raises(ConfigError, match="the model of .* is tessera.ctr.models.deepfm.DeepFM"):
        run_config(made / "run", ["model.target=os.system"])


def test_reports_show_what_a_folder_says_as_text(crafted):
    """Names and values out of a run's folder are no markup in its pages."""
    evil = "<script>alert(1)</script>"
    run = crafted / "run"
    for name in ("config.yaml", "plan.txt"):
        (run / name).write_text((run / name).read_text() + f"\n# {evil}\n")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: synthetic", f'name: "{evil}"'))
    versions = json.loads((run / "versions.json").read_text()) | {evil: evil}
    (run / "versions.json").write_text(json.dumps(versions))
    assert script("report", run).returncode == 0
    assert script("compare", run, run).returncode in (0, 2)
    pages = list(run.rglob("*.html"))
    assert pages and all("<script>alert" not in page.read_text() for page in pages)
    assert "&lt;script&gt;alert" in (run / "report.html").read_text()


def test_nothing_pickled_is_read_anywhere():
    """Ranks of one job send each other objects by pickle; no file and no network beyond the job is read so."""
    words = re.compile(
        r"import pickle|pickle\.|torch\.load\(|torch\.save\(|allow_pickle(?!=False)|joblib|shelve|marshal|dill\.|"
        r"yaml\.(unsafe_load|full_load|load)\(|distributed\.checkpoint\.(api|metadata|filesystem)|dcp\.|(?<![.\w])(eval|exec)\("
    )
    files = [
        path
        for room in ("ctr", "distributed", "embedding", "kernels", "scripts")
        for path in (ROOT / room).rglob("*.py")
    ]
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        if "bench" not in path.parts
        for line in path.read_text().splitlines()
        if words.search(line)
    }
    assert not found


def damage(state: Path) -> None:
    (state / "dense" / "00000-of-00001.json").write_text("damaged")


@pytest.mark.parametrize("name", ["resume", "daily"])
def test_states_of_which_none_can_be_read_stop_the_job(made, crafted, name):
    folder = crafted / ("run" if name == "resume" else "daily")
    for state in (folder / "checkpoints").glob("step-*"):
        damage(state)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}
    done = script(*commands(made, crafted)[name])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"error: none of the states in {folder}/checkpoints can be read, nothing is trained (")
    assert said.count("is passed over: dense/00000-of-00001.json has ") == len(list(folder.glob("checkpoints/step-*")))
    assert "to begin anew on purpose, move that folder away or name another trainer.run_dir" in said
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != ".lock")
    shutil.move(folder / "checkpoints", crafted / "away")
    if name == "resume":
        assert script(*commands(made, crafted)[name]).returncode == 0


def test_the_full_state_below_all_deltas_is_damaged_on_two_ranks(made, tmp_path):
    options = train(made, tmp_path / "run", "trainer.checkpoint.full_every=9", "trainer.checkpoint.keep_last=9")
    assert script("train", *options).returncode == 0
    damage(tmp_path / "run" / "checkpoints" / folder_name(3))
    done = run_script("scripts/train.py", *options, "trainer.resume=auto", "trainer.max_steps=12", world=2)
    assert done.returncode != 0
    assert f"{folder_name(3)}, which it builds on" in done.stderr or "none of the states in" in done.stderr
    assert "none of the states in" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints" / folder_name(12)).exists()


def test_each_command_says_whose_state_it_found(made, crafted):
    done = script("train", *arguments(made / "data", crafted / "daily", *SMALL, "trainer.resume=auto"))
    assert done.returncode == 2
    assert "is a state of scripts/daily.py, from which scripts/train.py cannot go on; go on with" in done.stderr
    done = script("daily", *daily_command(made / "days", crafted / "run", "embedding=dynamic"))
    assert done.returncode == 2
    assert "is a state of scripts/train.py, from which scripts/daily.py cannot go on" in done.stderr
    done = script("train", *train(made, crafted / "new", f"trainer.resume={crafted / 'run' / 'best'}"))
    assert done.returncode == 2 and "is a model without what training needs besides" in done.stderr
    for folder in ("run", "daily"):
        assert (crafted / folder / "config.yaml").read_bytes() == (made / folder / "config.yaml").read_bytes()


def test_a_killed_save_of_the_best_model_leaves_nothing(made, crafted):
    """By more ranks, so that a file of it would lie beside those of the next model."""
    run = crafted / "run"
    stray = run / ".partial-best" / "rows" / "c" / "00002-of-00003.parquet"
    stray.parent.mkdir(parents=True)
    stray.write_text("of a rank that was killed")
    (run / ".deleted-best").mkdir()
    assert script(*commands(made, crafted)["resume"]).returncode == 0
    assert not list(run.rglob("00002-of-00003*")) and not list(run.glob(".partial-*")) + list(run.glob(".deleted-*"))
    assert script(*commands(made, crafted)["evaluate"]).returncode == 0


@pytest.mark.parametrize("key", ["records", "partition", "step", "reader"])
def test_wrong_records_of_days_are_one_line(made, crafted, key):
    state = newest(crafted / "daily")
    training = json.loads((state / "training.json").read_text())
    daily = training["daily"]
    if key in ("records", "record"):
        daily[key] = "../../x"
    elif key == "reader":
        daily["record"] = daily["records"].pop()
    else:
        daily["records"][-1][key] = "../../x" if key == "partition" else {}
    (state / "training.json").write_text(json.dumps(training))
    reseal(state)
    done = script(*commands(made, crafted)["daily"])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert str(state) in done.stderr.strip().splitlines()[-1]


def resume_from_wrong_values(process, made: Path, at: Path, seed: int, count: int) -> list[str]:
    """What is said of a description with one wrong value, `count` of them drawn."""
    said = []
    state = newest(at / "run")
    path = state / "training.json"
    training = json.loads(path.read_text())
    config = {"config": {"optimizer": training["config"]["optimizer"]}}  # of which the rest is only told
    tried = list(mutations(training | config))
    for number, (what, changed) in enumerate(random.Random(seed).sample(tried, count)):
        path.write_text(json.dumps(changed))
        reseal(state)
        config = load_config(train(made, at / f"again-{number}", f"trainer.resume={state}"), "")
        try:
            Trainer(config, process).log.close()
        except TesseraError as error:
            assert "\n" not in str(error), what
            said.append(str(error))
        shutil.rmtree(at / f"again-{number}")
    return said


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_wrong_values_in_the_description_of_training_are_one_line(made, crafted, count):
    (said,) = on_ranks(1, resume_from_wrong_values, made, crafted, count, count)
    assert len(said) > count // 4
