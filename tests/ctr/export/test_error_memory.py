"""An error memory by its closed forms, and what it may know when."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tessera.ctr.metrics.exact import logloss
from tessera.ctr.serving import ExportError
from tessera.ctr.serving.error_memory import FILE, ErrorMemory, MemorySettings
from tessera.ctr.serving.in_time import Labelled, blocks_of, corrected_in_time, rows_of

WIDTH = 5


def drawn(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, labels, and predictions that have nothing to do with them."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=draw)
    return hidden, torch.randint(0, 2, (rows,), generator=draw).float(), torch.rand(rows, generator=draw)


def slow(settings: MemorySettings, planes: torch.Tensor, written, hidden, prediction) -> torch.Tensor:
    """The definition, row by row, in float64, from all rows that were written."""
    h, y, p = (one.double() for one in written)
    h, unit = h / h.norm(dim=1, keepdim=True), hidden.double() / hidden.double().norm(dim=1, keepdim=True)
    found = prediction.double().clone()
    for row, own in enumerate(prediction.double()):
        scores, labels, bases = [], [], []
        for of in planes.double():
            same = ((h @ of.T > 0) == (unit[row] @ of.T > 0)).all(1)
            if same.any():
                scores.append(torch.cosine_similarity(unit[row], h[same].mean(0), dim=0) / settings.temperature)
                labels.append(y[same].mean())
                bases.append(p[same].mean())
        if scores:
            a = torch.softmax(torch.stack(scores), 0)
            label, base = (a * torch.stack(labels)).sum(), (a * torch.stack(bases)).sum()
            error = settings.gamma * (label - own) + (1 - settings.gamma) * (label - base)
            found[row] = (own + settings.strength * error).clamp(0, 1)
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_it_is_its_definition(gamma):
    settings = MemorySettings(arrays=3, bits=4, strength=0.7, gamma=gamma, seed=9)
    memory, (hidden, label, prediction) = ErrorMemory(WIDTH, settings, "m"), drawn(40)
    for begin in range(0, 40, 7):
        here = slice(begin, begin + 7)
        memory.add(hidden[here], label[here], prediction[here])
    others, _, own = drawn(30, 1)
    expected = slow(settings, memory._planes, (hidden, label, prediction), others, own)
    torch.testing.assert_close(memory.corrected(others, own).double(), expected, rtol=0, atol=1e-6)
    assert memory.rows == 40 and memory.bytes == 3 * 16 * (4 * WIDTH + 24)


def test_strength_0_and_an_empty_memory_are_the_model_bit_for_bit():
    hidden, label, prediction = drawn(200)
    prediction[:3] = torch.tensor([0.0, 1.0, 1e-30])
    empty = ErrorMemory(WIDTH, MemorySettings(), "m")
    assert torch.equal(empty.corrected(hidden, prediction), prediction)
    assert empty.corrected(hidden[:0], prediction[:0]).shape == (0,)
    for gamma in (0.0, 0.4, 1.0):
        memory = ErrorMemory(WIDTH, MemorySettings(strength=0.0, gamma=gamma), "m")
        memory.add(hidden, label, prediction)
        assert torch.equal(memory.corrected(hidden, prediction), prediction)


def test_one_bucket_without_gamma_is_calibration():
    hidden, label, prediction = drawn(300)
    memory = ErrorMemory(WIDTH, MemorySettings(arrays=4, bits=0, strength=0.6), "m")
    memory.add(hidden, label, prediction)
    shift = 0.6 * (label.double().mean() - prediction.double().mean())
    own = torch.linspace(0.3, 0.7, 9)
    torch.testing.assert_close(memory.corrected(hidden[:9], own), (own + shift).float(), rtol=0, atol=1e-6)


def test_what_was_written_last_counts_and_probabilities_stay_probabilities():
    hidden, _, _ = drawn(1)
    memory = ErrorMemory(WIDTH, MemorySettings(strength=1.0, gamma=0.0), "m")
    memory.add(hidden, torch.ones(1), torch.full((1,), 0.1))
    assert memory.corrected(hidden, torch.tensor([0.5])) == 1.0
    memory.clear("n")
    assert memory.base == "n" and memory.rows == 0 and memory.corrected(hidden, torch.tensor([0.5])) == 0.5


@pytest.mark.parametrize("delay", [0, 40, 10_000])
def test_no_label_is_used_before_it_is_known(delay):
    """Turning a label round moves no score of a row that came before it was known, nor the row's own."""
    draw = np.random.default_rng(delay)
    hidden, label, prediction = drawn(120)
    times = draw.integers(0, 300, 120)

    def scores(of: torch.Tensor) -> np.ndarray:
        memory = ErrorMemory(WIDTH, MemorySettings(arrays=4, bits=1, strength=0.9), "m")
        read = rows_of(hidden, prediction, of)
        found = corrected_in_time(memory, times, read, delay_seconds=delay, block_seconds=7, block_rows=9)
        assert memory.rows == 120, "all are known in the end"
        return found

    before, moved = scores(label), 0
    for row in draw.choice(120, 8, replace=False):
        turned = label.clone()
        turned[row] = 1 - turned[row]
        changed = scores(turned) != before
        assert not changed[times <= times[row] + delay].any()
        moved += int(changed.sum())
    assert (moved > 0) == (delay < 300)


def test_rows_without_a_label_are_corrected_and_not_written():
    hidden, label, prediction = drawn(50)
    counts = torch.arange(50) % 2 == 0
    memory = ErrorMemory(WIDTH, MemorySettings(), "m")
    corrected_in_time(
        memory, np.arange(50), lambda at: Labelled(hidden[at], prediction[at], label[at], counts[at]), block_seconds=1
    )
    assert memory.rows == 25


def test_blocks_are_short_and_of_few_rows():
    times = np.array([0, 1, 2, 9, 9, 9, 9, 30])
    assert list(blocks_of(times, 5, 3)) == [(0, 3), (3, 6), (6, 7), (7, 8)]
    assert list(blocks_of(times[:0], 5, 3)) == []


def test_it_is_saved_and_reads_the_same(tmp_path):
    hidden, label, prediction = drawn(60)
    memory = ErrorMemory(WIDTH, MemorySettings(arrays=3, bits=3, seed=4), "model-1")
    memory.add(hidden, label, prediction)
    memory.save(tmp_path)
    found = ErrorMemory.load(tmp_path)
    assert (found.base, found.rows, found.settings) == ("model-1", 60, memory.settings)
    assert torch.equal(found.corrected(hidden, prediction), memory.corrected(hidden, prediction))
    other = ErrorMemory.load(tmp_path, MemorySettings(arrays=9, bits=1, strength=0.0))
    assert other.settings == MemorySettings(arrays=3, bits=3, seed=4, strength=0.0)
    assert torch.equal(other.corrected(hidden, prediction), prediction)
    ErrorMemory(WIDTH, MemorySettings(bits=0), "m").save(tmp_path)  # one bucket, without projections
    assert ErrorMemory.load(tmp_path).settings.bits == 0


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "other", "version"])
def test_a_damaged_one_is_refused_in_a_line(tmp_path, damage):
    memory = ErrorMemory(WIDTH, MemorySettings(arrays=1, bits=2), "m")
    memory.save(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    if damage == "short":
        del content[-3:]
    if damage == "changed":
        content[-1] ^= 1
    if damage == "other":
        content[:] = b"\0" * 20
    if damage == "version":
        content[:] = content.replace(b'\\"format\\": 1', b'\\"format\\": 9')
    (tmp_path / FILE).write_bytes(content)
    if damage == "missing":
        (tmp_path / FILE).unlink()
    with pytest.raises(ExportError) as error:
        ErrorMemory.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def gain(turned: float) -> float:
    """Logloss that is gained by the hour where the truth has turned by so many radians since the model was frozen."""
    draw = np.random.default_rng(3)
    rows, width = 8000, 6
    hidden = draw.normal(size=(rows, width))
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    then, now = np.eye(width)[0] * 4, 4 * (np.cos(turned) * np.eye(width)[0] + np.sin(turned) * np.eye(width)[1])
    label = draw.random(rows) < 1 / (1 + np.exp(-hidden @ now))
    prediction = 1 / (1 + np.exp(-hidden @ then))
    of = [torch.from_numpy(one.astype(np.float32)) for one in (hidden, prediction, label)]
    memory = ErrorMemory(width, MemorySettings(arrays=8, bits=3), "m")
    corrected = corrected_in_time(memory, np.arange(rows), rows_of(*of), delay_seconds=60, block_seconds=100)
    losses = [logloss(one, of[2].numpy()) for one in (of[1].numpy(), corrected)]
    return losses[0] - losses[1]


def test_what_is_gained_grows_with_the_drift_and_costs_little_where_there_is_none():
    still, some, much = gain(0.0), gain(0.4), gain(0.8)
    assert abs(still) < 0.003 < some < much, (still, some, much)
