"""Before anything imports Triton: where there is no GPU, its kernels run on the CPU under its interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
