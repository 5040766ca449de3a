"""What the training step does with tensors on a GPU, on a pretended one: nothing meets a tensor of the CPU, and the
host waits only where docs/gpu.md says so."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.distil.config import DistilConfig
from tessera.ctr.distil.distillation import Distillation
from tessera.ctr.metrics.streaming import StreamingMetrics
from tessera.ctr.train.step_pipeline import to_device
from tessera.distributed.distinct_ids import distinct_ids
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.fields import OnDevice, scale_to_mean
from tessera.distributed.projections import Projections
from tessera.distributed.sequences import pool_or_keep
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.kernels import backend

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or "triton" not in backend.available_backends():
    pytest.skip("needs Triton's interpreter, and no GPU", allow_module_level=True)

from tessera.kernels.triton_ops import faults
from tests.kernels.pretended_gpu import GPU, PretendedGpu

FIELDS, ROWS = ["a", "b", "c"], 6


def batch_of(weighted: bool = False) -> Batch:
    lengths = torch.tensor([1, 0, 2, 1, 1, 1] * len(FIELDS), dtype=torch.int32)
    ids = torch.arange(int(lengths.sum())) // 2 - 5
    weights = torch.rand(len(ids)) if weighted else None
    keyed = KeyedJaggedTensor(FIELDS, ids, weights, lengths=lengths, stride=ROWS)
    labels = torch.tensor([[0.0], [1.0]] * (ROWS // 2))
    return Batch(torch.rand(ROWS, 2), keyed, labels, torch.ones(ROWS), None, None, ROWS, number=torch.arange(ROWS))


@contextlib.contextmanager
def on_gpu(monkeypatch, batch: Batch):
    """The pretended GPU and the batch on it, when nothing has waited yet."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with PretendedGpu() as pretended:
        there = to_device(batch, GPU)
        assert there.ids.values().device == there.labels.device == GPU and there.number.device.type == "cpu"
        pretended.waits = 0
        yield there, pretended


def test_ids_of_all_tables_are_merged_without_waiting(monkeypatch):
    groups = (Group("v", 4, 0.5), Group("w", 1, 0.5))
    configs = [
        DynamicTableConfig(name, features, groups, RowOptimizer("sgd"))
        for name, features in (("a", ("a",)), ("bc", ("b", "c")))
    ]
    tables, batch = DynamicTables(configs, FIELDS, 100, ["b"]), batch_of()
    with on_gpu(monkeypatch, batch) as (there, pretended):
        with monkeypatch.context() as patched:
            patched.setattr(faults, "check", lambda device: None)  # the interpreter looks for faults after each op
            distinct_ids(there.ids, None, tables._fields_of_tables)  # notes of faults go to the device once
            pretended.waits = 0
            asked = distinct_ids(there.ids, None, tables._fields_of_tables)
        assert pretended.waits == 0
        rows = torch.rand(asked.mixed.numel(), 5, device=GPU)
        (sums, _), _ = pool_or_keep(
            rows, asked.index, there.ids, [False] * 3, tables.groups
        )  # here the interpreter looks for faults
        scale_to_mean(there.ids, tables._averaged)  # constants go to the device once
        pretended.waits = 0
        scaled = sums * scale_to_mean(there.ids, tables._averaged).t().unsqueeze(2)
        assert pretended.waits == 0
        distinct = int(asked.bounds[-1])  # what is behind is padded
        found = [asked.mixed[:distinct].cpu(), asked.bounds.cpu(), asked.index.cpu(), scaled.cpu()]
        rows = rows.cpu()
    asked = distinct_ids(batch.ids, None, tables._fields_of_tables)
    (sums, _), _ = pool_or_keep(rows, asked.index, batch.ids, [False] * 3, tables.groups)
    scale = scale_to_mean(batch.ids, OnDevice([False, True, False])).t().unsqueeze(2)
    assert all(map(torch.equal, found[:3], (asked.mixed, asked.bounds, asked.index)))
    torch.testing.assert_close(found[3], sums * scale)


def test_narrow_tables_are_projected_without_waiting(monkeypatch):
    groups = {"v": 4, "w": 1}
    configs = [
        DynamicTableConfig(name, features, (Group("v", dim, 0.5), Group("w", 1, 0.5)))
        for name, features, dim in (("a", ("a",), 2), ("bc", ("b", "c"), 4))
    ]
    projections = Projections(configs, FIELDS, groups)
    sums = {name: torch.rand(ROWS, len(FIELDS), dim) for name, dim in groups.items()}
    expected = projections(sums)["v"].detach()
    weights = [weight.detach() for weight in projections.weights]
    with on_gpu(monkeypatch, batch_of()) as (_, pretended):
        del projections.weights  # the pretended GPU does not move modules
        projections.weights = [weight.to(GPU) for weight in weights]
        there = {name: one.to(GPU) for name, one in sums.items()}
        projections(there)  # constants go to the device once
        pretended.waits = 0
        projected = projections(there)["v"]
        assert projected.device == GPU and pretended.waits == 0
        found = projected.cpu()
    torch.testing.assert_close(found, expected)


def test_metrics_and_the_teachers_loss_do_not_wait(monkeypatch):
    batch, logits = batch_of(), torch.linspace(-2, 2, ROWS)
    results = []
    for device in (None, GPU):
        distil = Distillation(DistilConfig(kind="self"), "cpu")
        distil.begin_period(torch.tensor([0.5, float("nan"), -1.0, 0.0, 2.0, -2.0]))
        metrics = StreamingMetrics(bins=8)
        if device is None:
            loss = distil.loss(logits, batch)
            metrics.update(logits, batch.labels[:, 0], batch.weight)
        else:
            with on_gpu(monkeypatch, batch) as (there, pretended):
                metrics.to(GPU)
                distil.sums = distil.sums.to(GPU)
                logits_there, pretended.waits = logits.to(GPU), 0
                loss = distil.loss(logits_there, there)
                metrics.update(logits_there, there.labels[:, 0], there.weight)
                assert pretended.waits == 0
                loss = loss.cpu()
                metrics.to("cpu")
        results.append((loss, metrics.compute()))
    torch.testing.assert_close(results[0], results[1])
