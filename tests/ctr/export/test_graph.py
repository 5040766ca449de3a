"""The graph of an archive, run operation by operation, is torch's own; what is unknown is left to torch's loader."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessera.ctr.export.tower import ServedTower, graph_of, inputs_of
from tessera.ctr.serving import ExportError, graph
from tessera.ctr.serving.graph import Graph, TorchGraph, load_graph
from tessera.ctr.serving.model_files import save_graph
from tests.ctr.export.graphs import by_torch
from tests.ctr.models.test_towers import make, named


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[ServedTower, Path]:
    """A tower with a batch norm, whose buffers are weights too, in mixed precision, and its archive."""
    one = ServedTower(make("deepfm", named(3, 4), batch_norm=True).float().eval(), amp=True)
    path = tmp_path_factory.mktemp("graph") / "tower.pt2"
    save_graph(graph_of(one, 3, 4), path)
    return one, path


def rows_of(one: ServedTower, rows: int) -> tuple[torch.Tensor, ...]:
    return inputs_of(one.tower.embedding_dims, 3, 4, rows, seed=rows)


def rewritten(path: Path, to: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive with each file changed, or left out."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as copy:
        for name in archive.namelist():
            content = change(name, archive.read(name))
            if content is not None:
                copy.writestr(name, content)
    return to


@torch.no_grad()
def test_answers_and_weights_are_those_of_torchs_loader(saved):
    one, path = saved
    ours, theirs = load_graph(path), by_torch(path)
    assert isinstance(ours, Graph)
    for rows in (1, 2, 300):
        assert torch.equal(ours(*rows_of(one, rows)), theirs(*rows_of(one, rows)))
    state = one.state_dict()
    for found in (ours.state_dict(), theirs.state_dict()):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


@torch.no_grad()
def test_other_weights_take_the_place_of_the_archives(saved):
    one, path = saved
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in one.state_dict().items()}
    inputs = rows_of(one, 5)
    for found in (load_graph(path), by_torch(path)):
        before, after = found(*inputs), found.with_weights(changed)
        assert torch.equal(found(*inputs), before) and not torch.equal(after(*inputs), before)
        assert torch.equal(after(*inputs), load_graph(path).with_weights(changed)(*inputs))
        name = next(iter(changed))
        for wrong in ({}, changed | {"more": torch.zeros(1)}, changed | {name: torch.zeros(3, 3, 3)}):
            with pytest.raises((ValueError, RuntimeError)):
                found.with_weights(wrong)


def test_a_value_is_forgotten_behind_the_last_operation_that_reads_it(saved):
    (step,) = (one for one in load_graph(saved[1])._steps._steps if isinstance(one.inputs[4], graph.Steps))
    steps = step.inputs[4]
    forgotten = [place for inner in steps._steps for place in inner.last]
    kept = {one.place for one in steps._outputs}
    used = {place for inner in steps._steps for place in graph._places([inner.inputs, list(inner.named.values())])}
    assert len(forgotten) == len(set(forgotten)) and not kept & set(forgotten) and used <= kept | set(forgotten)


@torch.no_grad()
@pytest.mark.parametrize("what", ["version", "operation", "argument", "order of bytes"])
def test_what_is_unknown_is_left_to_torchs_loader(saved, tmp_path, monkeypatch, what):
    one, path = saved
    if what == "version":
        monkeypatch.setattr(graph, "SCHEMA", 7)
    elif what == "operation":
        monkeypatch.setattr(graph, "_operation", lambda target: (_ for _ in ()).throw(graph.UnknownError(target)))
    elif what == "argument":
        monkeypatch.setattr(graph, "KINDS", {})
    else:
        path = rewritten(path, tmp_path / "tower.pt2", lambda name, old: None if name.endswith("byteorder") else old)
    found = load_graph(path)
    assert isinstance(found, TorchGraph)
    monkeypatch.undo()
    assert torch.equal(found(*rows_of(one, 7)), load_graph(saved[1])(*rows_of(one, 7)))


def test_an_archive_with_anything_pickled_is_refused(saved, tmp_path):
    one, path = saved

    def pickles_a_weight(name: str, old: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            said = json.loads(old)
            next(iter(said["config"].values()))["use_pickle"] = True
            return json.dumps(said).encode()
        return old

    def names_an_object(name: str, old: bytes) -> bytes:
        if name.endswith("model_constants_config.json"):
            return json.dumps({"config": {"one": {"path_name": "custom_obj_0", "use_pickle": False}}}).encode()
        return old

    with_inputs = io.BytesIO()
    torch.save(1, with_inputs)
    changes = [pickles_a_weight, names_an_object]
    changes += [lambda name, old: with_inputs.getvalue() if name.endswith("sample_inputs/model.pt") else old]
    for number, change in enumerate(changes):
        odd = rewritten(path, tmp_path / f"{number}.pt2", change)
        with pytest.raises(ExportError, match="in it is pickled") as error:
            load_graph(odd)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "no model", "a weight cut", "another file"])
def test_what_is_no_archive_is_one_line(saved, tmp_path, damage):
    odd = tmp_path / "tower.pt2"
    content = saved[1].read_bytes()
    if damage in ("empty", "cut", "another file"):
        odd.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "another file": b"{}" * 500}[damage])
    elif damage == "no model":
        rewritten(saved[1], odd, lambda name, old: None if name.endswith("model.json") else old)
    else:
        rewritten(saved[1], odd, lambda name, old: old[:-4] if name.endswith("weights/weight_0") else old)
    with pytest.raises(ExportError, match="tower.pt2 cannot be loaded: ") as error:
        load_graph(odd)
    assert "\n" not in str(error.value)
