"""Every visible entry below a path is read, or the job ends in a line that names it."""

import os
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import one_line
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.reader import ParquetReader

from .rows import features, taken_apart

SCHEMA = features("row")


def put(root: Path, *names: str, rows: int = 3) -> str:
    """Parquet files of these names, each with rows of its own: 100 times its place among all and on."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first = 100 * sum(len(files) for _, _, files in os.walk(root))
        pq.write_table(pa.table({"label": [0] * rows, "row": range(first, first + rows)}), path)
    return str(root)


def rows_of(path, **options) -> list[int]:
    reader = ParquetReader(path, SCHEMA, 7, lanes=1, shuffle=False, **options)
    return [row["ids"]["row"][0] for batch in reader.epoch(0) for row in taken_apart(batch)]


@pytest.mark.parametrize(
    "name", ["000000_0", "PART-1.PARQUET", "part.Parq", "part-00000", "_day=1/p.parquet", "x.parquet/p.pq", "0001.gz"]
)
def test_files_of_other_writers_are_read(tmp_path, name):
    assert len(rows_of(put(tmp_path, "part-0.parquet", name))) == 6


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("part-1.parquet.gz", b"\x1f\x8b", r"part-1.parquet.gz: found a visible file that is not named as parquet is"),
        ("part-0.parquet.bak", None, r"part-0.parquet.bak: found a visible file .*choose files by a pattern"),
        ("part-1.parquet.tmp", None, r"part-1.parquet.tmp: found a visible file"),
        ("deeper/rows.csv", b"1,2\n", r"deeper/rows.csv: found a visible file"),
        ("notes.txt", b"", r"notes.txt: found a visible file"),
        ("000000_0", b"1\t2\n3\t4 and more\n", r"000000_0: no readable parquet footer in its 17 bytes"),
        ("empty.parquet", b"", r"empty.parquet: no readable parquet footer in its 0 bytes"),
        ("secret.parquet", b"PARE" + bytes(40) + b"PARE", r"secret.parquet: its footer is encrypted"),
        ("part-1.parquet._COPYING_", None, r"part-1.parquet._COPYING_: is still being copied; wait for it"),
        ("_temporary/0/part-1.parquet", None, r"_temporary: a job that writes here has not ended"),
        ("a/_temporary/0/x", b"", r"a/_temporary: a job that writes here has not ended"),
        ("_spark_metadata/0", b"v1", r"_spark_metadata: Spark's log says which files of this stream count"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, name, content, problem):
    put(tmp_path, "part-0.parquet")
    if content is None:
        put(tmp_path, name)
    else:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem) as error:
        rows_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_what_holds_no_rows_is_passed_over_and_counted(tmp_path):
    put(tmp_path, "a=1/part-0.parquet", "_backup/part-0.parquet", ".part-0.parquet.swp", "_temporary/x.parquet")
    names = ["_SUCCESS", "_metadata", "a=1/.part-0.parquet.crc", "a=1/part-0.parquet.crc", "a=1/part-0.parquet.md5",
             "a_$folder$", "schema.yaml", "prepare.json", "README.md", "LICENSE"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    listing = list_files(str(tmp_path))
    assert [file.name for file in listing.files] == ["a=1/part-0.parquet"]
    expected = [f"{tmp_path}/{name}" for name in [*names, "_backup", "_temporary", ".part-0.parquet.swp"]]
    assert sorted(listing.passed_over) == sorted(expected)
    assert ParquetReader(str(tmp_path), SCHEMA, 7).passed_over == listing.passed_over


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "data", "part-0.parquet")
    put(tmp_path / "elsewhere", "part-1.parquet")
    (tmp_path / "data" / "more").symlink_to("../elsewhere")
    (tmp_path / "data" / "more" / "round").symlink_to("../elsewhere")
    assert len(rows_of(str(tmp_path / "data"))) == 6
    (tmp_path / "data" / "again.parquet").symlink_to("part-0.parquet")
    with pytest.raises(DataError, match=r"part-0.parquet: listed twice, first as .*again.parquet; its rows would"):
        rows_of(str(tmp_path / "data"))
    (tmp_path / "data" / "again.parquet").unlink()
    os.link(tmp_path / "data" / "part-0.parquet", tmp_path / "data" / "hard.parquet")
    with pytest.raises(DataError, match="listed twice"):
        rows_of(str(tmp_path / "data"))


def test_links_to_nowhere_and_pipes_are_named(tmp_path):
    put(tmp_path, "part-0.parquet")
    (tmp_path / "part-1.parquet").symlink_to("gone.parquet")
    with pytest.raises(DataError, match="part-1.parquet: is a link that leads nowhere; expected a file"):
        rows_of(str(tmp_path))
    (tmp_path / "part-1.parquet").unlink()
    os.mkfifo(tmp_path / "part-1.parquet")
    with pytest.raises(DataError, match="part-1.parquet: is neither file nor folder"):
        rows_of(str(tmp_path))


def test_the_rule_holds_behind_a_uri(tmp_path):
    put(tmp_path, "000000_0", "deeper/part-0.parquet", "_logs/x.parquet", "_SUCCESS", "deeper/.hidden")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/listing/rule", recursive=True)
    try:
        here, there = list_files(str(tmp_path)), list_files("memory://listing/rule")
        assert [file.name for file in there.files] == [file.name for file in here.files]
        shown = [name.replace(str(tmp_path), "memory://listing/rule") for name in here.passed_over]
        assert there.passed_over == shown
        assert rows_of("memory://listing/rule") == rows_of(str(tmp_path))
        memory.pipe("/listing/rule/rows.csv", b"1")
        with pytest.raises(DataError, match="memory://listing/rule/rows.csv: found a visible file"):
            rows_of("memory://listing/rule")
    finally:
        memory.rm("/listing", recursive=True)


def test_hours_without_zeros_come_in_the_order_of_time(tmp_path):
    path = put(tmp_path, *(f"day=2026-1-{day}/hour={hour}/p.parquet" for day in (10, 9) for hour in (10, 9, 8)))
    names = [file.name.split("/")[:2] for file in list_files(path).files]
    assert names == [[f"day=2026-1-{day}", f"hour={hour}"] for day in (9, 10) for hour in (8, 9, 10)]


def test_patterns(tmp_path):
    root = put(tmp_path, "a/part-1.parquet", "a/part-2.parquet", "b/part-1.parquet", "b/deep/part-3.parquet",
               "b/old.dat", "_c/part-1.parquet")  # fmt: skip
    count = lambda *patterns: len(rows_of([f"{root}/{one}" for one in patterns])) // 3  # noqa: E731
    assert count("a/part-*.parquet") == 2
    assert count("*/part-1.parquet") == 2  # without the hidden one
    assert count("**/part-[13].parquet") == 3
    assert count("_c/*") == 1
    assert count("b/*.dat") == 1  # a suffix that the pattern names is what the user means
    assert count("a", "b/part-?.parquet") == 3
    assert count("[b]/deep") == 1
    for pattern, problem in {
        "b*": r"b/old.dat: found a visible file",
        "c*": rf"{root}/c\*: found no parquet file",
        "nowhere/*": rf"nowhere/\*: found no folder {root}/nowhere",
        "a*/*-2.parquet": None,
    }.items():
        if problem is None:
            assert count(pattern) == 1
            continue
        with pytest.raises(DataError, match=problem):
            count(pattern)
    with pytest.raises(DataError, match="part-1.parquet: listed twice"):
        count("a", "a/part-1*")
    (tmp_path / "a" / "_temporary").mkdir()
    with pytest.raises(DataError, match="a/_temporary: a job that writes here has not ended"):
        count("a/part-*.parquet")
    os.rename(tmp_path / "a", tmp_path / "x[1]*")  # a name that looks like a pattern and is there
    shutil.rmtree(tmp_path / "x[1]*" / "_temporary")
    assert count("x[1]*") == 2


def test_a_folder_without_its_marker_is_not_read_where_others_have_one(tmp_path):
    root = put(tmp_path, "dt=1/p.parquet", "dt=2/p.parquet", "dt=2/hour=1/p.parquet", "plain/p.parquet")
    assert len(rows_of(root)) == 12
    (tmp_path / "_SUCCESS").touch()
    assert len(rows_of(root)) == 12, "the marker of the whole says nothing about a part"
    (tmp_path / "dt=1" / "_SUCCESS").touch()
    with pytest.raises(DataError, match=r"its folder dt=2 holds no _SUCCESS, and others do, so it may be half written"):
        rows_of(root)
    with pytest.raises(DataError, match="its folder dt=2 holds no _SUCCESS"):
        rows_of([f"{root}/dt=1", f"{root}/dt=2"])
    assert len(rows_of(root, marker=None)) == 12 and len(rows_of(f"{root}/dt=1")) == 3
    (tmp_path / "dt=2" / "_SUCCESS").touch()  # it speaks for the hours below, too
    assert len(rows_of(root)) == 12


def test_a_marker_of_another_name(tmp_path):
    root = put(tmp_path, "2026-11-01/p.parquet", "2026-11-02/p.parquet")
    (tmp_path / "2026-11-01" / "READY").touch()
    with pytest.raises(DataError, match="2026-11-01/READY: no readable parquet footer"):
        rows_of(root)
    from tessera.ctr.data.day_folders import DayFolders

    plain = DayFolders(None)
    with pytest.raises(DataError, match="its folder 2026-11-02 holds no READY"):
        rows_of(root, marker="READY", folders=plain)
    (tmp_path / "2026-11-02" / "READY").touch()
    assert len(rows_of(root, marker="READY", folders=plain)) == 6


#: Names of files with, as it is written down here a second time, whether a parquet file of that name is data.
VISIBLE = ["a.parquet", "B.PARQUET", "000000_0", "c.pq", "part", "_x=1", "d.gz"]
HIDDEN = [".a.parquet", "_b.parquet", "_SUCCESS", "_metadata", ".c.crc", "e.parquet.crc", "schema.yaml"]
STRANGE = ["a.parquet.gz", "b.csv", "c.parquet.bak", "d.tmp", "e.json"]
FOLDERS = ["k=1", "k=2", "sub", "day=2026-11-01", "hour=7", "hour=25", "_hid", ".hid", "_h=1", "x.parquet"]
TREES = st.dictionaries(
    st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=2).map(tuple), st.sampled_from(VISIBLE + HIDDEN + STRANGE)),
    st.tuples(st.integers(0, 3), st.sampled_from(["parquet"] * 9 + ["text"])),
    min_size=1,
    max_size=8,
)


@given(tree=TREES, remote=st.booleans())
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_rows_of_a_random_tree_are_delivered_or_the_entry_is_named(tmp_path_factory, tree, remote):
    root = tmp_path_factory.mktemp("tree")
    expected, refused, first = [], [], 0
    for (folders, name), (rows, kind) in tree.items():
        path = root.joinpath(*folders, name)
        if path.is_dir() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            columns = {
                "label": pa.array([0] * rows, pa.int8()),
                "row": pa.array(range(first, first + rows), pa.int64()),
            }
            pq.write_table(pa.table(columns), path)
        else:
            path.write_text("label,row\n0,1\n")
        hidden = any(one[0] in "._" and "=" not in one for one in folders) or name in HIDDEN
        if hidden:
            continue
        if name in STRANGE or kind == "text":
            refused.append("/".join([*folders, name]))
        else:
            expected += range(first, first + rows)
        first += rows
    location = str(root)
    if remote:
        location = "memory://random/tree"
        fsspec.filesystem("memory").put(str(root), "/random/tree", recursive=True)
    try:
        found = rows_of(location)
    except DataError as error:
        line = one_line(error)
        assert str(error) == line
        unmarked = "holds no _SUCCESS, and others do" in line
        if refused and not unmarked:
            assert any(f"{location}/{name}" in line for name in refused), (line, refused)
        elif not unmarked:
            assert not expected and ("found 0 rows" in line or "found no parquet file" in line), (line, expected)
    else:
        assert not refused
        assert sorted(found) == sorted(expected)
    finally:
        shutil.rmtree(root)
        if remote:
            fsspec.filesystem("memory").rm("/random", recursive=True)
