"""The seam to torchrec and torch.distributed: processes, sharding, agreement between ranks."""

import warnings

# torchrec 1.8 still calls collectives by names that torch 2.13 announces to rename; users can do nothing about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
