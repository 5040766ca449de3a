"""No command replaces, empties or adds to what it did not write."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from pathlib import Path

import pytest

from tessera.ctr import output_folders
from tessera.ctr.data.convert.command import add_kinds, prepare
from tessera.ctr.output_folders import RECORD, Replacement, check_place, claim, replacing
from tessera.embedding.errors import ConfigError
from tests.ranks import on_ranks


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: content of files, None for folders."""
    return {
        str(path.relative_to(folder)): None
        if path.is_dir() and not path.is_symlink()
        else os.readlink(path).encode()
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def write(target: Path, content: str, sources: tuple = (), command: str = "tool", **options) -> None:
    with replacing(target, "--output", command, sources, **options) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "result").write_text(content)


@pytest.mark.parametrize("before", ["missing", "empty", "earlier", "link to earlier"])
def test_a_target_that_is_free_or_its_own_is_replaced(tmp_path, before):
    target = tmp_path / "deep" / "target"
    if before == "empty":
        target.mkdir(parents=True)
    if "earlier" in before:
        write(target, "old")
    if "link" in before:
        (tmp_path / "link").symlink_to(target)
        write(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
    else:
        write(target, "new")
    assert {name for name in tree(target)} == {RECORD, "sub", "sub/result"}
    assert (target / "sub" / "result").read_text() == "new"
    assert json.loads((target / RECORD).read_text()) == {"command": "tool", "files": ["sub/result"]}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def foreign_files(target: Path) -> str:
    target.mkdir()
    (target / "thesis").write_text("mine")
    return "it holds thesis and no record that tool wrote it"


def added_file(target: Path) -> str:
    write(target, "old")
    (target / "sub" / "thesis").write_text("mine")
    return "it holds sub/thesis, which tool did not write"


def added_hidden_file(target: Path) -> str:
    write(target, "old")
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("mine")
    return "it holds .git/HEAD, which tool did not write"


def added_link(target: Path) -> str:
    write(target, "old")
    (target / "sub" / "home").symlink_to(target.parent)
    return "it holds sub/home, which tool did not write"


def of_another_command(target: Path) -> str:
    write(target, "old", command="other")
    return "and no record that tool wrote it"


def record_of_nonsense(target: Path) -> str:
    write(target, "old")
    (target / RECORD).write_text('{"command": "tool", "files": "sub/result"}')
    return "and no record that tool wrote it"


def a_file(target: Path) -> str:
    target.write_text("mine")
    return "it is not a folder"


def a_broken_link(target: Path) -> str:
    target.symlink_to(target.parent / "nowhere")
    return "it is not a folder"


REFUSED = [foreign_files, added_file, added_hidden_file, added_link, of_another_command, record_of_nonsense, a_file]


@pytest.mark.parametrize("make", [*REFUSED, a_broken_link])
def test_what_others_wrote_is_named_and_untouched(tmp_path, make):
    target = tmp_path / "target"
    expected = make(target)
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as raised:
        write(target, "new")
    message = str(raised.value)
    assert message.startswith(f"--output {target} is not replaced: ") and expected in message and "\n" not in message
    assert tree(tmp_path) == before


def test_a_file_that_comes_while_the_result_is_made_is_not_lost(tmp_path):
    target = tmp_path / "target"
    write(target, "old")
    with pytest.raises(ConfigError, match="it holds thesis"), replacing(target, "--output", "tool", ()) as folder:
        (folder / "result").write_text("new")
        (target / "thesis").write_text("mine")
    assert (target / "thesis").read_text() == "mine" and (target / "sub" / "result").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path / "target", "old")
    before = tree(tmp_path)
    with pytest.raises(KeyError), replacing(tmp_path / "target", "--output", "tool", ()) as folder:
        (folder / "result").write_text("new")
        raise KeyError
    assert tree(tmp_path) == before


def test_where_names_cannot_be_exchanged_the_result_still_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folders, "exchange", lambda *_: False)
    write(tmp_path / "target", "old")
    write(tmp_path / "target", "new")
    assert (tmp_path / "target" / "sub" / "result").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("target", "how"),
    [
        ("source", "is"),
        ("source/", "is"),
        ("source/new", "lies inside"),
        ("source/sub/deep/er", "lies inside"),
        (".", "contains"),
        ("other/../source/new", "lies inside"),
        ("link/new", "lies inside"),
        ("link", "is"),
        ("parent", "contains"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_target_never_lies_in_or_around_what_is_read(tmp_path, monkeypatch, target, how, relative):
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "data").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    (tmp_path / "parent").symlink_to(tmp_path)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    wanted = Path(target) if relative else Path(f"{tmp_path}/{target}")
    for source in (tmp_path / "source", "source", tmp_path / "link", f"file://{tmp_path}/source"):
        with pytest.raises(ConfigError, match=f"--output .* {how} .*source|{how} .*link") as raised:
            write(wanted, "new", (source,))
        assert "which is read" in str(raised.value)
    assert tree(tmp_path) == before


def test_places_beside_what_is_read_are_free(tmp_path):
    (tmp_path / "source").mkdir()
    for target in ("source-2", "sourc", "source-2/source"):
        check_place(tmp_path / target, "--output", [tmp_path / "source", "s3://bucket/x", tmp_path / "nowhere"])
    check_place(tmp_path / "source" / "made" / "x", "--output", [tmp_path / "source"], [tmp_path / "source" / "made"])
    with pytest.raises(ConfigError, match="lies inside"):
        check_place(tmp_path / "source" / "madex", "--output", [tmp_path / "source"], [tmp_path / "source" / "made"])


def test_what_a_pattern_matches_is_no_place_for_a_result(tmp_path):
    (tmp_path / "data" / "day=1").mkdir(parents=True)
    for pattern, target in (("data/*", "data/out"), ("data/*", "data/a/b"), ("data/**", "data/out"), ("da*", "data")):
        with pytest.raises(ConfigError, match="is matched by .*, which is read; expected another place"):
            check_place(tmp_path / target, "--output", [str(tmp_path / pattern)])
    for pattern, target in (("data/day=*", "data/out"), ("data/*.parquet", "data/out"), ("data/*/*.parquet", "out")):
        check_place(tmp_path / target, "--output", [str(tmp_path / pattern), f"s3://bucket/{pattern}"])


def test_two_that_write_at_once_do_not_remove_each_others_work(tmp_path):
    first = Replacement(tmp_path / "target", "--output", "tool", ())
    (first.folder / "a").write_text("first")
    write(tmp_path / "target", "second")
    assert (first.folder / "a").read_text() == "first"
    first.finish()
    assert (tmp_path / "target" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_is_added_to_must_be_the_commands_own(tmp_path):
    claim(tmp_path / "sweep", "--output", "sweep.py", ())
    (tmp_path / "sweep" / "run").mkdir()
    claim(tmp_path / "sweep", "--output", "sweep.py", ())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    before = tree(tmp_path)
    for target, expected in (("mine", "it holds thesis and no record"), ("sweep", "contains"), ("sweep/run", "is")):
        with pytest.raises(ConfigError, match=expected):
            claim(tmp_path / target, "--output", "sweep.py", [tmp_path / "sweep" / "run"])
    assert tree(tmp_path) == before


def both_write(process, folder: Path) -> str:
    with output_folders.replacing_on_ranks(process, folder / "target", "--output", "tool", ()) as made:
        (made / f"of-{process.rank}").write_text("")
    try:
        with output_folders.replacing_on_ranks(process, folder / "mine", "--output", "tool", ()):
            return "not refused"
    except ConfigError as error:
        return str(error)


def test_ranks_write_into_one_folder_and_are_refused_together(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    said = on_ranks(2, both_write, tmp_path)
    assert said[0] == said[1] and "it holds thesis" in said[0]
    assert set(tree(tmp_path)) == {"mine", "mine/thesis", "target", "target/of-0", "target/of-1", f"target/{RECORD}"}


def prepared(*arguments: object) -> str:
    parser = ArgumentParser()
    add_kinds(parser)
    return prepare(parser.parse_args([str(one) for one in arguments]))


CSV = """delimiter: ','
columns: [{name: label, type: int8}, {name: a, type: int64}]
schema: {labels: [label], features: [{name: a, kind: id}]}
"""


@pytest.mark.parametrize("kind", ["synthetic", "movielens", "csv"])
def test_prepare_replaces_its_own_data_set_and_nothing_else(tmp_path, kind):
    """Each converter, by the same rule; --overwrite is consent to replace an earlier data set, not other files."""
    if kind == "synthetic":
        call, source = ["synthetic", "--rows", 1000], None
    elif kind == "movielens":
        source = tmp_path / "ml"
        source.mkdir()
        items = "1::A (1990)::Drama\n2::B (1991)::Drama\n"
        (source / "movies.dat").write_text(items)
        (source / "users.dat").write_text("".join(f"{n}::F::1::10::1\n" for n in range(1, 60)))
        ratings = "".join(f"{n}::{1 + n % 2}::{1 + 4 * (n % 2)}::9783007{n:02d}\n" for n in range(1, 60))
        (source / "ratings.dat").write_text(ratings)
        call = ["movielens", "--input", source]
    else:
        source = tmp_path / "conf"
        source.mkdir()
        (source / "in.csv").write_text("label,a\n" + "".join(f"{n % 2},{n}\n" for n in range(100)))
        text = CSV + f"input: {{files: ['{source / 'in.csv'}']}}\n"
        (source / "mine.yaml").write_text(text)
        call = ["csv", "--config", source / "mine.yaml"]
    target = tmp_path / "data"
    prepared(*call, "--output", target)
    with pytest.raises(ConfigError, match="--overwrite replaces"):
        prepared(*call, "--output", target)
    prepared(*call, "--output", target, "--overwrite")
    (target / "train" / "more.parquet").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="it holds train/more.parquet, which prepare.py did not write"):
        prepared(*call, "--output", target, "--overwrite")
    if source is not None:
        with pytest.raises(ConfigError, match="which is read"):
            prepared(*call, "--output", source / ("new" if kind == "movielens" else "in.csv"), "--overwrite")
        with pytest.raises(ConfigError, match="contains"):
            prepared(*call, "--output", tmp_path, "--overwrite")
    assert tree(tmp_path) == before
