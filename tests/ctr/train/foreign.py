"""A model outside of `tessera.ctr.models`. To import it leaves a mark, as it would run whatever else it holds."""

import os
from pathlib import Path

from tessera.ctr.models.deepfm import DeepFM

if "TESSERA_TEST_MARKER" in os.environ:
    Path(os.environ["TESSERA_TEST_MARKER"]).touch()


class Mine(DeepFM):
    """DeepFM under another name."""
