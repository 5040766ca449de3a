"""A file is replaced as a whole or not at all."""

import pytest

from tessera.distributed.atomic import partial_of, put_in_place, replacing_file, write_text


def test_a_file_is_made_and_replaced(tmp_path):
    for text in ("one", "zwei ä"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyError), replacing_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyError

    def full(_):
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_written_in_pieces_is_put_in_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "part.parquet"
    partial_of(path).write_text("rows")
    assert not list(tmp_path.glob("*.parquet"))  # nobody takes what is half written for a file of the data
    put_in_place(partial_of(path).name, path.name)
    assert path.read_text() == "rows" and len(list(tmp_path.iterdir())) == 1
