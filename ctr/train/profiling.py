"""Trace given steps with torch's profiler, into the run folder."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from tessera.ctr.config_types import ProfileConfig
from tessera.distributed.rank import Process


class StepProfiler:
    """Traces the steps that `trainer.profile` names, on every rank; without them it does nothing."""

    def __init__(self, config: ProfileConfig, run_dir: Path, process: Process) -> None:
        self._folder, self._process = run_dir / "profile", process
        self._begin = None if config.start is None else config.start - 1
        self._end = 0 if config.start is None else config.start - 1 + config.steps
        self._running: profile | None = None
        self._began = 0

    def at(self, step: int) -> None:
        """Begin or end the trace where `step` steps are done. A run that goes on among the steps traces the rest."""
        if self._running is not None and step >= self._end:
            self.close(step)
        elif self._running is None and self._begin is not None and self._begin <= step < self._end:
            activities = [ProfilerActivity.CPU]
            if self._process.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running, self._began = profile(activities=activities), step
            self._running.start()

    def close(self, step: int) -> None:
        """End a trace that has begun, and write profile/steps-<first>-<last>-rank-<rank>.json.gz."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._began + 1}-{step}-rank-{self._process.rank}.json.gz"
        running.export_chrome_trace(str(self._folder / name))
