"""What a training step of dynamic tables over several ranks costs the host of a GPU, on a pretended one whose other
ranks ask and answer as it does."""

import contextlib
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.overrides import _pop_mode, _push_mode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import ShardingEnv

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.fields import OnDevice
from tessera.distributed.oov_rows import with_oov_of_tables
from tessera.distributed.torchrec import answers, kernel
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.kernels import autograd, backend, pool
from tessera.kernels.host_numbers import HostCopy
from tessera.scripts.bench.exchange import echo, plan_of

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or "triton" not in backend.available_backends():
    pytest.skip("needs Triton's interpreter, and no GPU", allow_module_level=True)

from tests.kernels import pretended_gpu
from tests.kernels.counted_gpu import CountedGpu

BATCH = 16
FUNCTIONS = (answers._Answer, answers._Repeated, kernel._LookUp, pool._Pool)


def marked(result):
    """What autograd's functions give, on the pretended GPU: torch makes tensors of its own of it."""
    for tensor in result if isinstance(result, tuple) else (result,):
        setattr(tensor, pretended_gpu._MARK, True)
    return result


@contextlib.contextmanager
def on_pretended_gpu():
    """A counted GPU that backward passes run on, too."""
    with CountedGpu() as gpu, contextlib.ExitStack() as stack:
        for function in FUNCTIONS:

            def backward(context, *grads, given=function.backward):
                _push_mode(gpu)
                try:
                    return given(context, *marked(grads))
                finally:
                    _pop_mode()

            stack.enter_context(mock.patch.object(function, "backward", staticmethod(backward)))
        for module in (answers, kernel, autograd):
            apply = lambda function, *inputs: marked(function.apply(*inputs))  # noqa: E731
            stack.enter_context(mock.patch.object(module, "apply", apply))
        yield gpu


def batch_of(names, first, device):
    values = torch.arange(first, BATCH + first).repeat(len(names)).to(device)
    batch = KeyedJaggedTensor(names, values, lengths=torch.ones(len(values), dtype=torch.int32).to(device))
    batch.offset_per_key(), batch.offsets()
    return batch


def agree(model, begun):
    """Read what all ranks told, where there are several."""
    return begun.told.tolist() if model.tells else []


def steps(tables, ranks, device, counting):
    """Sums of what steps with known and with new ids look up, and what `counting` counts of each."""
    names = [f"t{number}" for number in range(tables)]
    configs = [DynamicTableConfig(name, (name,), (Group("v", 4, 0.5), Group("w", 1, 0.0))) for name in names]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with mock.patch.object(dist, "all_to_all_single", echo):
            model = DynamicTables(configs, names, 100)
            env = ShardingEnv.from_process_group(dist.group.WORLD)
            where = torch.device(device)
            model.collection = model.sharders()[0].shard(model.collection, plan_of(model, ranks), env, where)
            sums, counted = [], []
            batches = [batch_of(names, first, device) for first in (0, 0, 0, 5, 5)]
            agree(model, model.begin(batches[0]))
            for step, (batch, coming) in enumerate(pairwise(batches)):
                model.begin_step(now=step)
                with counting() as counts:  # as in training: the next batch is begun before this one's forward pass
                    begun = model.begin(coming)
                    out = model(batch)
                    agree(model, begun)
                    model.send_begun()
                    torch.autograd.backward([out["v"].sum() + out["w"].sum()])
                counted += counts
                sums += [out["v"].sum().item(), out["w"].sum().item()]
            return sums, counted
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "tables", "issued", "waits"),
    [
        (1, 1, 45, 1),
        pytest.param(1, 200, 45, 1, marks=pytest.mark.slow),
        (2, 1, 90, 1),
        pytest.param(2, 26, 90, 1, marks=pytest.mark.slow),
        pytest.param(2, 200, 90, 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_costs_the_host_as_much_for_any_number_of_tables(ranks, tables, issued, waits):
    """Once messages have room for the ids, and memory has room for new rows."""
    expected, _ = steps(tables, ranks, "cpu", lambda: contextlib.nullcontext([]))
    with on_pretended_gpu() as gpu:
        found, counted = steps(tables, ranks, "cuda", gpu.counting)
    assert found == pytest.approx(expected, rel=1e-5)
    known, new = counted[2:]
    assert known.issued <= issued and known.waits == waits, known  # the loss of the test takes 6
    if tables < 200:  # there the map's only segment has to be split
        assert new.issued <= issued + 45 and new.waits == waits, new


def test_learned_rows_stand_for_missing_ones_without_a_wait():
    """Answers of three tables, of which one has none, and two that are padded."""
    bounds, numbers, turns = torch.tensor([0, 4, 4, 6]), OnDevice([0, 2, 1]), []
    answered = torch.cat([torch.rand(8, 5), torch.tensor([1.0, 0, 1, 1, 1, 0, 1, 1]).unsqueeze(1)], 1)
    for device in ("cpu", "cuda"):
        with on_pretended_gpu() if device == "cuda" else contextlib.nullcontext() as gpu:
            oov = torch.arange(15.0).view(3, 5).to(device).requires_grad_()
            came, ends = (answered if gpu else answered[:6]).to(device), bounds.to(device)
            numbers.on(came.device)
            waits = gpu.waits if gpu else 0
            rows = with_oov_of_tables(came, ends, oov, numbers)
            assert not gpu or gpu.waits == waits
            rows[:6].square().sum().backward()
            turns.append((rows[:6].detach().cpu(), oov.grad.cpu()))
    for found, expected in zip(*turns, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_copy_is_waited_for_unless_the_host_has_waited_since_it_began():
    with CountedGpu() as gpu:
        numbers = torch.arange(3).to("cuda", non_blocking=True)
        assert HostCopy(numbers).read().tolist() == [0, 1, 2] and gpu.waits == 1
        copy, sums = HostCopy(numbers), numbers.sum()
        assert sums.item() == 3 and copy.read().tolist() == [0, 1, 2] and gpu.waits == 2
