"""Connect to torchrec and torch.distributed: processes, sharding, agreement between ranks."""

import logging
import warnings

# torchrec 1.8 calls by names that torch 2.13 will rename, and advises on its planner; users can do nothing about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*|torchrec\..*")
# Planner advice and deprecations, none of which a user can follow.
for noisy in ("torchrec", "torch.fx._symbolic_trace"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
