"""What a training step of dynamic tables over several ranks costs the host of a GPU, on a pretended one whose other
ranks ask and answer as it does."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.overrides import _pop_mode, _push_mode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import ShardingEnv

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.torchrec import answers, kernel
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.kernels import autograd, backend, pool
from tessera.scripts.bench.exchange import echo, plan_of

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or "triton" not in backend.available_backends():
    pytest.skip("needs Triton's interpreter, and no GPU", allow_module_level=True)

from tests.kernels import pretended_gpu
from tests.kernels.counted_gpu import CountedGpu

BATCH = 16
FUNCTIONS = (answers._Answer, kernel._LookUp, pool._Pool)


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
            for step, first in enumerate((0, 0, 0, 5)):
                values = torch.arange(first, BATCH + first).repeat(tables).to(device)
                lengths = torch.ones(BATCH * tables, dtype=torch.int32).to(device)
                batch = KeyedJaggedTensor(names, values, lengths=lengths)
                batch.offset_per_key(), batch.offsets()
                model.begin_step(now=step)
                with counting() as counts:
                    out = model(batch)
                    torch.autograd.backward([out["v"].sum() + out["w"].sum()])
                counted += counts
                sums += [out["v"].sum().item(), out["w"].sum().item()]
            return sums, counted
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "tables", [1, pytest.param(26, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.slow)]
)
def test_a_step_over_ranks_costs_the_host_as_much_for_any_number_of_tables(tables):
    expected, _ = steps(tables, 2, "cpu", lambda: contextlib.nullcontext([]))
    with on_pretended_gpu() as gpu:
        found, counted = steps(tables, 2, "cuda", gpu.counting)
    assert found == pytest.approx(expected, rel=1e-5)
    known, new = counted[2:]
    assert known.issued <= 90 and known.waits <= 3, known  # the loss of the test takes 6
    assert new.issued <= 330 if tables == 200 else new.issued <= 170, new
