"""Imported once by the process that ranks are forked from: all that a rank would otherwise do anew when it starts.

Hydra's grammar is compiled while the first override is read. And what is frozen here is no garbage that a rank looks
through when it ends, for which the system would copy every page of it.
"""

import gc

import tessera.ctr.daily.loop
import tessera.ctr.models.deepfm
import tessera.ctr.train.trainer  # noqa: F401
from tessera.ctr.config import load_config

load_config(["trainer.run_dir=/nowhere/a run"], "")
gc.collect()
gc.freeze()
