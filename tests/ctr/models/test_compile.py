"""torch.compile changes neither logits nor gradients, and the length of a batch may change."""

import pytest
import torch
import torch.distributed as dist

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower, compiler_mode
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

SCHEMA = "data.schema.features=[{name: x, kind: numeric}, {name: a}, {name: b}, {name: c}]"
SMALL = {"fgcnn": ["model.kernel=3", "model.channels=[2]", "model.classifier.hidden=[8]"]}
MODELS = ["deepfm", "ipnn", "autoint_plus", "pin", "fgcnn", "xdeepfm"]


# Each takes half a minute to compile; the others share these layers.
@pytest.mark.slow
@pytest.mark.parametrize(("model", "mode"), [("deepfm", "reduce-overhead"), *((model, None) for model in MODELS)])
def test_compiled_equals_eager(model, mode):
    """On the CPU the mode of CUDA graphs compiles the same and records none."""
    config = load_config(
        [f"model={model}", SCHEMA, "data.schema.time=null", *SMALL.get(model, ["model.hidden=[8]"])], ""
    )
    torch.manual_seed(0)
    tower = build_tower(config, Schema(config.data.schema))
    parameters = [parameter for parameter in tower.parameters() if parameter.numel()]
    for rows in (64, 40, 64, 24):
        numeric = torch.randn(rows, 1)
        embeddings = {group: torch.randn(rows, 3, dim) for group, dim in tower.embedding_dims.items()}
        eager = tower.forward(numeric, embeddings)
        tower.compile(mode=mode)
        compiled = tower(numeric, embeddings)
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        expected = torch.autograd.grad(eager.sum(), parameters, allow_unused=True)
        found = torch.autograd.grad(compiled.sum(), parameters, allow_unused=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_cuda_graphs_need_the_compiler_and_a_gpu(tmp_path):
    fixed = [SCHEMA, "data.schema.time=null", f"data.path={tmp_path}", "trainer.cuda_graphs=true"]
    with pytest.raises(ConfigError, match="trainer.cuda_graphs is true; expected trainer.compile true"):
        load_config(fixed, "")
    config = load_config([*fixed, "trainer.compile=true"], "")
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="trainer.cuda_graphs is true and the run is on the CPU"):
        Trainer(config, Process(0, 0, 1, cpu, dist.HashStore()))
    # What was trained on a GPU may be scored on a CPU.
    assert compiler_mode(config, cpu) is None and compiler_mode(config, torch.device("cuda", 1)) == "reduce-overhead"
    config.trainer.cuda_graphs = False
    assert compiler_mode(config, torch.device("cuda", 1)) is None
