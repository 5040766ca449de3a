"""Check an installation, and name the cure of each problem.

Standard library only: torch, which may be missing or broken, is tried in a child process.

Every check yields findings: `ok` (works), `warn` (works, but less well than it could) or `FAIL` (training
will not run).
"""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.metadata as metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.kernels import build_record

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "requirements"  # of a checkout; an installed wheel has its own metadata instead
REINSTALL = "run `make install`"
if not LISTS.is_dir():  # for CUDA, tessera-ctr[cuda] alone
    REINSTALL = "run `pip install 'tessera-ctr[cpu]' && pip install --no-deps torchrec==1.8.0`"

# Runs in a child process, because a torch and an fbgemm that do not fit may end the process instead of
# raising.
PROBE = """
import json
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    found["gpus"] = torch.cuda.device_count()
    import tessera.kernels.backend
    found["backend"] = tessera.kernels.backend.backend()
    found["problem"] = tessera.kernels.backend.problem
    import fbgemm_gpu
    ends = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3])).tolist()
    found["fbgemm"] = ends == [0, 2, 5]
    import torchrec
    found["torchrec"] = True
except Exception as error:
    while error.__cause__:
        error = error.__cause__
    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("probe " + json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    level: str  # ok | warn | FAIL
    subject: str
    text: str
    cure: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<5} {self.subject:<9} {self.text}"
        return f"{line}; cure: {self.cure}" if self.cure else line


def check_python(version: Sequence[int] = sys.version_info[:3]) -> Iterator[Finding]:
    name = ".".join(map(str, version[:3]))
    if (3, 10) <= tuple(version[:2]) <= (3, 12):
        yield Finding("ok", "python", name)
    else:
        cure = "remove .venv and run `TESSERA_PYTHON=/path/to/python3 make install`"
        yield Finding("FAIL", "python", f"{name}, expected 3.10 to 3.12", cure)


def canonical(name: str) -> str:
    """Return the normalised name of a distribution: fbgemm_gpu-cpu and fbgemm-gpu-cpu are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(folder: Path = LISTS) -> dict[str, str]:
    """Return name to version of everything that the lists pin, except lines with a marker. Without lists: the pins in
    the metadata of the installed distribution."""
    lines = [line for path in sorted(folder.glob("*.txt")) for line in path.read_text().splitlines()]
    if not folder.is_dir():
        lines = [line.partition(";")[0] for line in metadata.requires("tessera-ctr") or []]
    found = (re.fullmatch(r"([\w.-]+)==(\S+)", line.strip()) for line in lines)
    return {canonical(match[1]): match[2] for match in found if match}


def some(names: Sequence[str], shown: int = 6) -> str:
    """Join the names in one line, with the tail of a long list as a number."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def installed(path: Sequence[str] | None = None) -> dict[str, metadata.Distribution]:
    """Return distributions by normalised name; the first on the path counts, as for imports."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions(path=list(sys.path if path is None else path)):
        if name := distribution.metadata["Name"]:
            found.setdefault(canonical(name), distribution)
    return found


def check_versions(found: Mapping[str, metadata.Distribution], pins: Mapping[str, str]) -> Iterator[Finding]:
    """Fail if torch or torchrec is not the pinned version, and warn if another package is not."""
    for name in ("torch", "torchrec"):
        if name not in found:
            yield Finding("FAIL", name, "is not installed", REINSTALL)
        elif found[name].version.split("+")[0] != pins[name]:
            yield Finding("FAIL", name, f"{found[name].version}, expected {pins[name]}", REINSTALL)
        else:
            yield Finding("ok", name, found[name].version)
    skip = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "setuptools")
    others = [name for name in sorted(pins) if name not in skip]
    missing = [name for name in others if name not in found]
    different = [f"{n} {found[n].version} ({pins[n]})" for n in others if n in found and found[n].version != pins[n]]
    if missing:
        yield Finding("FAIL", "packages", f"not installed: {some(missing)}", REINSTALL)
    if different:
        text = f"{len(different)} differ from requirements/ (pinned version in brackets): {some(different)}"
        yield Finding("warn", "packages", text, f"{REINSTALL} in a fresh .venv")
    elif not missing:
        yield Finding("ok", "packages", f"{len(others)} others as pinned")


def check_fbgemm(found: Mapping[str, metadata.Distribution], pins: Mapping[str, str]) -> Iterator[Finding]:
    """Check for exactly one build of fbgemm, of the pinned version, with the libraries that it brought."""
    builds = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if name in found]
    remove = "run `pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu` in .venv, remove .venv/.tessera-packages, "
    if not builds:
        yield Finding("FAIL", "fbgemm", "neither fbgemm-gpu-cpu nor fbgemm-gpu is installed", REINSTALL)
        return
    if len(builds) == 2:
        text = "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files"
        yield Finding("FAIL", "fbgemm", text, remove + REINSTALL)
        return
    name, build = builds[0], found[builds[0]]
    if build.version.split("+")[0] != pins[name]:
        yield Finding("FAIL", "fbgemm", f"{name} {build.version}, expected {pins[name]}", REINSTALL)
        return
    # The record itself, because Distribution.files leaves out missing files from Python 3.12 on.
    for file, *_, size in csv.reader((build.read_text("RECORD") or "").splitlines()):
        if not file.endswith(".so"):
            continue
        path = Path(str(build.locate_file(file)))
        if not path.is_file():
            yield Finding("FAIL", "fbgemm", f"{file} of {name} is missing", remove + REINSTALL)
            return
        if size and path.stat().st_size != int(size):
            sizes = f"{path.stat().st_size:,} bytes, expected {int(size):,}"
            text = f"{file} is not the one of {name} ({sizes}): another build overwrote it"
            yield Finding("FAIL", "fbgemm", text, remove + REINSTALL)
            return
    yield Finding("ok", "fbgemm", f"{name} {build.version}")


def probe() -> dict:
    """Import torch, our kernels, fbgemm and torchrec in a child process and return what it found; key `error` if that
    fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        child = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return {"error": "importing torch, fbgemm and torchrec took more than 300 s"}
    for line in child.stdout.splitlines():
        if line.startswith("probe "):
            return json.loads(line[len("probe ") :])
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"the process ended with status {child.returncode}: {last}"}


def check_loading(found: Mapping) -> Iterator[Finding]:
    fresh = f"remove .venv and {REINSTALL}"
    if any(library in found.get("error", "") for library in ("libcuda.so", "libnvidia-ml.so")):
        # No failure: images with the CUDA stack are built on machines without a GPU.
        cure = "run where a driver is or, without a GPU, `TESSERA_STACK=cpu make install`"
        text = "fbgemm-gpu (CUDA) loads only beside an NVIDIA driver, none is here"
        yield Finding("warn", "import", text, cure)
    elif "error" in found:
        last = [name for name in ("torch", "fbgemm", "torchrec") if name in found]
        text = f"importing torch, kernels, fbgemm and torchrec fails after {last[-1] if last else 'nothing'}"
        yield Finding("FAIL", "import", f"{text}: {found['error']}", fresh)
    elif not found["fbgemm"]:
        yield Finding("FAIL", "import", "an fbgemm operator gives a wrong result", fresh)
    else:
        yield Finding("ok", "import", "torch, fbgemm operators and torchrec load")


def check_kernels(found: Mapping) -> Iterator[Finding]:
    """Check that the kernels are compiled and current; otherwise say why plain torch is used."""
    if found.get("backend") == "cpp":
        record = build_record.read()
        yield Finding("ok", "kernels", f"{record['library']}, compiled with {record['compiler']}")
    elif "backend" in found:
        cure = "" if "TESSERA_" in found["problem"] else "install a C++ compiler and run `make install`"
        text = f"plain torch is used, which is slower: {found['problem'].removesuffix('; ' + REINSTALL)}"
        yield Finding("warn", "kernels", text, REINSTALL if REINSTALL in found["problem"] else cure)


def check_compiler() -> Iterator[Finding]:
    command = os.environ.get("CXX", "c++")
    try:
        run = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60)
        works = run.returncode == 0
    except (OSError, subprocess.SubprocessError):
        works = False
    if works:
        yield Finding("ok", "compiler", (run.stdout.splitlines() or [command])[0])
    else:
        cure = "install g++ (Debian, Ubuntu: apt-get install g++) or set CXX"
        yield Finding("warn", "compiler", f"{command} does not run; the kernels cannot be compiled", cure)


def check_threads(environment: Mapping[str, str] = os.environ, cores: int | None = None) -> Iterator[Finding]:
    cores = cores or len(os.sched_getaffinity(0))
    threads = environment.get("OMP_NUM_THREADS", "")
    policy = environment.get("OMP_WAIT_POLICY", "").upper()
    text = f"{cores} cores, OMP_NUM_THREADS {threads or 'unset'}, OMP_WAIT_POLICY {policy or 'unset'}"
    if threads.isdigit() and int(threads) > cores:
        yield Finding("warn", "threads", text, f"set OMP_NUM_THREADS to {cores} / ranks or less")
    elif policy == "ACTIVE":
        cure = "set OMP_WAIT_POLICY=PASSIVE: waiting threads take the cores from other ranks"
        yield Finding("warn", "threads", text, cure)
    else:
        yield Finding("ok", "threads", text)


def gpu_drivers() -> list[str]:
    """Return 'name, driver version' of each NVIDIA GPU that the driver shows."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return run.stdout.strip().splitlines() if run.returncode == 0 else []


def check_gpu(found: Mapping, gpus: Sequence[str], *, cuda_fbgemm: bool) -> Iterator[Finding]:
    """Check GPU and driver against the builds of torch and fbgemm."""
    cuda, usable = found.get("cuda"), found.get("gpus", 0)
    switch = "run `TESSERA_STACK=cuda make install`"
    if cuda_fbgemm and "torch" in found and not cuda:
        cure = f"run `TESSERA_STACK=cpu make install` or, with a GPU, {switch.removeprefix('run ')}"
        yield Finding("FAIL", "gpu", "fbgemm-gpu is the CUDA build, torch is a CPU build", cure)
    elif not gpus:
        yield Finding("ok", "gpu", "none; training runs on the CPU")
    elif not cuda or not cuda_fbgemm:
        text = f"{gpus[0]}, but {'torch' if not cuda else 'fbgemm'} is a CPU build"
        yield Finding("warn", "gpu", text, f"{switch} to use it")
    elif not usable:
        text = f"torch for CUDA {cuda} cannot use {gpus[0]}"
        yield Finding("FAIL", "gpu", text, f"install a driver for CUDA {cuda} or set CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("ok", "gpu", f"{usable} usable, {gpus[0]}, CUDA {cuda}")


def check_space(root: Path = ROOT, shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    for name, path, least in (("disk", root, 2 << 30), ("shm", shared, 64 << 20)):
        if path.is_dir():
            free = shutil.disk_usage(path).free
            text = f"{free / 2**30:.1f} GiB free in {path}"
            if free >= least:
                yield Finding("ok", name, text)
            else:
                cure = "free some space" if name == "disk" else "in a container: --shm-size=1g or --ipc=host"
                yield Finding("warn", name, f"{text}, {least / 2**30:.1f} are little", cure)


def find_spec(name: str, path: Sequence[str]) -> importlib.machinery.ModuleSpec | None:
    """Return the spec that `import name` would find with this module search path, regardless of earlier imports here;
    None if there is none."""
    before, sys.path[:] = list(sys.path), list(path)
    try:
        # All finders: an editable installation puts its own behind the one that looks into the path.
        specs = (finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
    finally:
        sys.path[:] = before


def check_names(path: Sequence[str]) -> Iterator[Finding]:
    """Check that `import tessera...` with this module search path finds our packages.

    `tessera` is a namespace without files of its own. A module or a package of that name hides all that is below.
    """
    spec = find_spec("tessera", path)
    if spec is None:
        yield Finding("FAIL", "names", "tessera is not installed for this Python", REINSTALL)
    elif spec.origin is not None:
        place = Path(spec.origin)
        place = place.parent if place.name == "__init__.py" else place
        owners = " ".join(sorted(set(metadata.packages_distributions().get("tessera", [])) - {"tessera-ctr"}))
        cure = f"run `pip uninstall {owners}`" if owners else "move it away, or off PYTHONPATH,"
        yield Finding("FAIL", "names", f"{place} hides our package tessera", f"{cure} or use a fresh .venv")
    else:
        yield Finding("ok", "names", "no other package hides tessera")


def check_all(path: Sequence[str], *, quick: bool = False) -> Iterator[Finding]:
    """Run all checks, in an order in which the first failure is the likely cause of the later ones.

    path: the module search path that the other scripts have. quick leaves out what an installation cannot
    change.
    """
    found, pins = installed(path), pinned()
    yield from check_python()
    yield from check_versions(found, pins)
    yield from check_fbgemm(found, pins)
    yield from check_names(path)
    tried: dict = {}
    if "torch" in found:
        tried = probe()
        yield from check_loading(tried)
        yield from check_kernels(tried)
    if not quick:
        yield from check_compiler()
        yield from check_threads()
        yield from check_gpu(tried, gpu_drivers(), cuda_fbgemm="fbgemm-gpu" in found)
        yield from check_space()
