"""Further forms of an exported tower: compiled for this machine by AOTInductor, and ONNX."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tessera.ctr.export.tower import ServedTower, difference_of, inputs_of
from tessera.ctr.serving.errors import ExportError
from tessera.embedding.errors import ConfigError

COMPILED, ONNX = "tower.aoti.pt2", "tower.onnx"
EQUAL = 1e-4  # of logits, beside the graph's: other kernels add in another order
MOST_ROUNDINGS = 4  # so often may they lie as far apart as the tower lies from itself in float64


def write_compiled(program: torch.export.ExportedProgram, folder: Path) -> str:
    """Write the tower as an AOTInductor package, which C++ runs without Python; return its name.

    Raises ConfigError: torch cannot compile it here; it says why.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED))
    except Exception as error:  # of a compiler, or from inside of torch
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--compile: AOTInductor cannot compile the tower on this machine: {reason}") from None
    return COMPILED


@torch.no_grad()
def write_onnx(served: ServedTower, folder: Path, numeric: int, ids: int) -> str:
    """Write the tower as ONNX and compare it with the tower, by onnxruntime; return its name.

    Raises ConfigError: the extra `onnx` is not installed, or torch cannot convert the tower. ExportError: onnxruntime
    gives other logits.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx needs {missing[0]}: pip install tessera-ctr[onnx]")
    if served.sequences:
        raise ConfigError(
            f"--onnx: the model reads sequence {served.sequences[0].name!r} event by event, and a graph of ONNX has "
            "pooled features alone; leave out --onnx"
        )
    import onnxruntime

    groups = list(served.groups)
    inputs = inputs_of(served.tower.embedding_dims, numeric, ids, 3)
    rows = torch.export.Dim("rows", min=1, max=1 << 24)
    try:
        torch.onnx.export(
            served.eval(),
            inputs,
            folder / ONNX,
            input_names=["numeric", *groups],
            output_names=["logits"],
            dynamic_shapes=({0: rows}, tuple({0: rows} for _ in groups)),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, from inside of torch
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--onnx: torch.onnx cannot convert the tower: {reason}") from None
    names = {one.name for one in session.get_inputs()}
    for count in (1, 300):
        inputs = inputs_of(served.tower.embedding_dims, numeric, ids, count, seed=count)
        fed = {n: one.numpy() for n, one in zip(["numeric", *groups], inputs, strict=True) if n in names}
        logits = served(*inputs)
        difference = difference_of(torch.from_numpy(session.run(None, fed)[0]), logits)
        # Crosses of high degree cancel out so that the tower itself is farther than that from what it would be exactly.
        bound = max(EQUAL, MOST_ROUNDINGS * difference_of(logits.double(), _exact(served, inputs)))
        if not difference <= bound:
            raise ExportError(
                f"--onnx: onnxruntime's logits lie {difference:.1e} from the tower's, expected {bound:.0e}"
            )
    return ONNX


def _exact(served: ServedTower, inputs: Sequence[Tensor]) -> Tensor:
    """Return logits computed in float64."""
    logits: Tensor = copy.deepcopy(served).double()(*(one.double() for one in inputs))
    return logits
