"""deepctr-torch as a contender: a process in the environment of peers/deepctr_torch.sh that takes a step when asked."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "peers" / "deepctr_torch_speed.py"
# Ours and its model of the same kind; it has no FGCNN and no PIN.
MODELS = {"deepfm": "DeepFM", "ipnn": "PNN", "autoint_plus": "AutoInt", "dcn_v2": "DCNMix", "xdeepfm": "xDeepFM"}


class Peer:
    """One model. Between steps the process waits for a line and takes no processor time."""

    def __init__(self, environment: Path, model: str, ids: int, threads: int):
        python = environment / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python}: not found; scripts/bench/peers/deepctr_torch.sh {environment} makes it")
        arguments = ["--serve", "--models", model, "--ids", str(ids), "--threads", str(threads)]
        self.process = subprocess.Popen(
            [str(python), str(SCRIPT), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # both are pipes
        self._asked, self._answers = self.process.stdin, self.process.stdout
        self._answer("ready")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()  # its standard input ends, and so does it

    def step(self) -> None:
        self._asked.write("\n")
        self._asked.flush()
        self._answer("done")

    def _answer(self, expected: str) -> None:
        """Waits for this line; others are the library's own."""
        for line in self._answers:
            if line.strip() == expected:
                return
        raise SystemExit(f"deepctr-torch: ended with status {self.process.wait()}, expected {expected!r}")
