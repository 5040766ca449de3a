"""What is special to the Triton kernels: registration, faults noted on the device, long merges, compilation."""

import contextlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessera.kernels import backend, schemas
from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.gather import gather
from tessera.kernels.id_map import IdMap
from tessera.kernels.initialise import InitialValues, init_rows
from tessera.kernels.optimizers import OPTIMIZERS, OptimizerSettings
from tessera.kernels.random import normal, stream, uniform
from tessera.kernels.update import update
from tests.kernels.tables import some_rows, table
from tests.kernels.test_update import LR, fresh_table

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    "triton" not in available_backends(), reason="Triton is not installed, or was imported without TRITON_INTERPRET=1"
)
needs_triton_somewhere = pytest.mark.skipif(
    "triton" not in available_backends() and not (torch.cuda.is_available() and backend.triton_problem is None),
    reason="Triton is not installed, or was imported without TRITON_INTERPRET=1",
)
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")


def moved(tensors, name):
    """Tensors where the backend runs: Triton on the GPU if there is one."""
    return [tensor.to("cuda" if name == "triton" and torch.cuda.is_available() else "cpu") for tensor in tensors]


@needs_cpp
def test_every_op_is_compiled():
    """With the parameters of its definition: the library would not load with others."""
    for name in schemas.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tessera::{name}", "CPU")


def test_every_op_has_a_triton_version():
    ops = pytest.importorskip("tessera.kernels.triton_ops", reason="Triton is not installed")
    for name, (definition, _) in schemas.OPS.items():
        assert list(inspect.signature(getattr(ops, name)).parameters) == list(inspect.signature(definition).parameters)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tessera::{name}", "CUDA")


def test_without_the_compiled_library_ops_are_defined_for_tracing():
    """As on a machine with torch and Triton alone."""
    code = (
        "import torch, tessera.kernels.gather; from tessera.kernels import backend; assert backend.problem;"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    chunks, rows = [torch.zeros(8, 4)], torch.zeros(3, dtype=torch.int64)\n"
        "    assert torch.ops.tessera.gather(chunks, rows, 4, None, None, 0).shape == (3, 4)"
    )
    environment = {**os.environ, "TESSERA_KERNELS": "reference"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)


@needs_triton_somewhere
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_rows_with_many_positions_are_merged_in_pieces(optimizer):
    """Rows of 1, 64, 65 and several hundred positions: deterministic, and the sums of the definition."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 64, 65, 700, 0, 200])
    inverse = torch.arange(6).repeat_interleave(lengths)[torch.randperm(1030, generator=generator)]
    grads, rows = torch.randn((1030, 5), generator=generator), torch.tensor([3, 17, 9, -1, 2, 11])
    rows[3] = 20
    found = []
    for name in ("reference", "triton", "triton"):
        chunks = moved(fresh_table(optimizer, 24, 5), name)
        with use_backend(name):
            update(optimizer, chunks, *moved((rows, grads, inverse), name), settings=OptimizerSettings(LR))
        found.append(torch.cat(chunks).cpu())
    assert found[1].equal(found[2])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@needs_triton_somewhere
@needs_cpp
@pytest.mark.parametrize("dim", [3, 16])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in ("rowwise_adagrad", "adam")])
def test_updates_are_those_of_the_compiled_kernels_bit_for_bit(optimizer, dim):
    """Where no sum over columns and no power is taken, whose order and last bit are each backend's own."""
    generator = torch.Generator().manual_seed(1)
    rows, inverse = some_rows(12, 24, distinct=True), torch.randint(0, 12, (60,), generator=generator)
    found = []
    for name in ("cpp", "triton"):
        chunks = moved(fresh_table(optimizer, 24, dim), name)
        with use_backend(name):
            for step in range(3):
                grads = torch.randn((60, dim), generator=torch.Generator().manual_seed(step))
                given = moved((rows, grads, inverse), name)
                update(optimizer, chunks, *given, settings=OptimizerSettings(LR, weight_decay=0.01, l1=0.01, l2=0.1))
        found.append(torch.cat(chunks).cpu())
    assert found[0].equal(found[1])


@needs_triton_somewhere
@needs_cpp
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_random_numbers_are_those_of_the_compiled_kernels(dim):
    initial = InitialValues("normal", 0.1, 0.3)
    drawn = []
    for name in ("cpp", "triton"):
        rows, ids, chunk = moved((torch.arange(600), torch.arange(-300, 300) * 7919, torch.zeros(1024, dim + 1)), name)
        with use_backend(name):
            init_rows([chunk], rows, ids, dim, initial, stream=stream(1, 2))
            drawn.append([x.cpu() for x in (uniform(5, 6, ids, dim, 2), normal(5, 6, ids, dim, 2), chunk)])
    assert drawn[0][0].equal(drawn[1][0])
    for one, other in zip(drawn[0][1:], drawn[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-22, atol=1e-7)


@needs_triton_somewhere
def test_what_is_out_of_range_is_skipped_and_raised_once_when_asked(monkeypatch):
    """As on a GPU, where no op waits: the kernel goes on, `check` raises."""
    from tessera.kernels.triton_ops import faults

    chunks, dense = table(16, 4)
    chunks = moved(chunks, "triton")
    with use_backend("triton"):
        monkeypatch.setattr(faults.launch, "INTERPRETED", False)
        if not torch.cuda.is_available():
            monkeypatch.setattr(faults.launch, "_device", lambda tensor: contextlib.nullcontext())
        found = gather(chunks, *moved([torch.tensor([3, 16, 5, 40])], "triton"), 4)
        assert found.cpu().equal(torch.stack([dense[3], torch.zeros(4), dense[5], torch.zeros(4)]))
        update("sgd", chunks, *moved([torch.tensor([99]), torch.ones(1, 4)], "triton"), settings=OptimizerSettings(1.0))
        assert torch.cat(chunks).cpu().equal(dense)
        with pytest.raises(IndexError, match="rows: expected below 16, found 99"):
            faults.check(chunks[0].device)
        faults.check(chunks[0].device)


@needs_triton_somewhere
def test_no_limit_of_another_table_is_named(monkeypatch):
    """The note does not tell which launch met the row; only a limit that all launches had is that of its table."""
    from tessera.kernels.triton_ops import faults

    small, large = (moved(table(rows, 4)[0], "triton") for rows in (16, 64))
    with use_backend("triton"):
        monkeypatch.setattr(faults.launch, "INTERPRETED", False)
        if not torch.cuda.is_available():
            monkeypatch.setattr(faults.launch, "_device", lambda tensor: contextlib.nullcontext())
        for chunks, row in ((small, 99), (large, 3)):
            gather(chunks, *moved([torch.tensor([row])], "triton"), 4)
        with pytest.raises(IndexError, match="rows: expected inside the rows of the table, found 99"):
            faults.check(small[0].device)
        gather(large, *moved([torch.tensor([99])], "triton"), 4)
        with pytest.raises(IndexError, match="rows: expected below 64, found 99"):
            faults.check(small[0].device)


@needs_triton
def test_addresses_are_sent_once_per_growth():
    from tessera.kernels.triton_ops.rows import bases_of

    chunks, _ = table(16, 4)
    first = bases_of(chunks, torch.device("cpu"))
    assert bases_of(list(chunks), torch.device("cpu")) is first
    chunks.append(torch.zeros_like(chunks[0]))
    assert bases_of(chunks, torch.device("cpu")).tolist() == [chunk.data_ptr() for chunk in chunks]
    with pytest.raises(ValueError, match="chunks: expected all contiguous and like the first"):
        bases_of([*chunks, torch.zeros(4, 8).t()], torch.device("cpu"))


@needs_triton
def test_backends_work_on_one_map():
    """Slots may differ, what is found may not, whoever inserted, split or erased."""
    ids = torch.randint(-(2**63), 2**63 - 1, (9_000,), generator=torch.Generator().manual_seed(0))
    id_map, rows = IdMap(), torch.arange(9_000)
    names = available_backends()
    with use_backend("triton"):
        id_map.insert(ids[:6_000], rows[:6_000])  # two splits
    id_map.insert(ids[6_000:], rows[6_000:])
    gone = ids[::90]
    with use_backend("triton"):
        assert id_map.erase(gone).equal(rows[::90])
    expected = torch.where(rows % 90 == 0, -1, rows)
    for name in names:
        with use_backend(name):
            assert id_map.find(ids).equal(expected)
    assert len(id_map) == 8_900


def compiled(*arguments):
    """Run `compile_kernels.py` without the interpreter; returns its lines."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def compiled_once():
    """Kernel -> what `compile_kernels.py` says of it, of each kernel, format and optimizer once; about 30 s."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return {line.split()[1].rstrip(":"): line for line in compiled("90")}


def test_every_kernel_compiles_for_a_gpu(compiled_once):
    sources = "".join(path.read_text() for path in (ROOT / "kernels" / "triton_ops").glob("*.py"))
    assert set(compiled_once) == set(re.findall(r"def (\w+_kernel)\(", sources))


@pytest.mark.parametrize("kernel", ["_records_find_kernel", "_records_gather_kernel", "_records_update_kernel"])
def test_records_and_lines_of_the_map_are_loaded_in_vectors(compiled_once, kernel):
    """In the PTX for sm_90: loads of 128 bits."""
    assert int(re.search(r"(\d+) loads of 128 bits", compiled_once[kernel])[1]) > 0


@pytest.mark.slow
def test_every_variant_compiles_for_two_generations():
    """Some 600 variants for each of sm_80 and sm_90; about 6 minutes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert len(compiled("--whole", "80", "90")) > 30


def test_the_backend_is_chosen_by_device():
    assert backend.backend() == backend._current and backend.backend("cuda") == backend._on_gpu
    with use_backend("reference"):
        assert backend.ops_for(torch.zeros(1)) is None
    with pytest.raises(ValueError, match="kernel backend 'cublas' is not available, found"), use_backend("cublas"):
        pass
