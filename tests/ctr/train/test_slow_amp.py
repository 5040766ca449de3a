"""A run in bfloat16 on a CPU that has no such products says so at its start, and no other run does."""

import pytest
import torch
import torch.distributed as dist

from tessera.ctr.config import load_config
from tessera.ctr.train.engine import slow_amp
from tessera.distributed.rank import Process


@pytest.mark.parametrize(
    ("amp", "device", "able", "said"),
    [
        ("true", "cpu", False, True),
        ("true", "cpu", True, False),
        ("true", "cuda", False, False),
        ("false", "cpu", False, False),
    ],
)
def test_it_is_said_where_it_is_so(monkeypatch, amp, device, able, said):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    config = load_config([f"trainer.amp={amp}"], "")
    line = slow_amp(config, Process(0, 0, 1, torch.device(device), dist.HashStore()))
    assert (line is not None) == said
    assert line is None or "trainer.amp" in line
