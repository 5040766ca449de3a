"""What pyproject.toml cannot say: which folder is which package, and how the C++ kernels are compiled.

Without torch, without a compiler, or when the compilation fails, the installation goes on: the kernels then
run as plain torch, and `kernels/_build.json` keeps the reason for `scripts/doctor.py`. TESSERA_BUILD=0
skips the compilation, TESSERA_BUILD=require makes its failure an error.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parent
#: Folders of the checkout; `ctr` is imported as `tessera.ctr`. Names such as `distributed` belong to others.
FOLDERS = ("kernels", "embedding", "distributed", "ctr", "conf", "scripts")
SERVING = {"tessera.serving": "ctr/serving"}  # the short name of what serves; its modules go by the long one
KERNELS = "tessera.kernels._C"

SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "csrc").glob("*.cpp"))
# No fused multiply-add: the same sources give the same bits on every x86-64 machine, whichever clone runs.
# No errno from square roots: nobody reads it, and loops with them become vector loops (Adam, FTRL).
# No floating-point traps: nobody catches them, and a choice between two numbers becomes a vector instruction.
# OpenMP is compiled in but not linked: the symbols come from the one OpenMP library that torch has loaded.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
COMPILE_ARGS += ["-fvisibility=hidden", "-Wall", "-g0"]
if sys.platform == "linux":
    COMPILE_ARGS.append("-fopenmp")


def _build_record() -> ModuleType:
    """kernels/build_record.py, by its path: nothing of the project is installed yet."""
    spec = importlib.util.spec_from_file_location("build_record", ROOT / "kernels" / "build_record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_record = _build_record()


def compiler_version() -> str:
    """First line of `$CXX --version`. Raises OSError or CalledProcessError when it does not run."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return (found.stdout.splitlines() or ["unknown"])[0]


def kernel_extension() -> Extension:
    if torch is None:
        return Extension(KERNELS, SOURCES)
    return CppExtension(KERNELS, SOURCES, extra_compile_args=COMPILE_ARGS, extra_link_args=["-s"], py_limited_api=True)


class BuildKernels(build_ext if torch is None else BuildExtension):
    def run(self) -> None:
        mode = os.environ.get("TESSERA_BUILD", "auto")
        folder = Path(self.get_ext_fullpath(KERNELS)).parent
        reason = "TESSERA_BUILD=0" if mode == "0" else self._compile(folder)
        if reason is None:
            return
        self.extensions = []
        build_record.write(folder, library=None, reason=reason)
        if mode == "require":
            raise SystemExit(f"TESSERA_BUILD=require, but the kernels were not compiled: {reason}")
        print(f"tessera: kernels not compiled, plain torch is used instead: {reason}", file=sys.stderr)

    def _compile(self, folder: Path) -> str | None:
        """Compile and write the record. Returns the reason when that fails."""
        if torch is None:
            return "torch is not installed"
        try:
            compiler = compiler_version()
        except (OSError, ValueError, subprocess.SubprocessError):
            return f"no working C++ compiler ({os.environ.get('CXX', 'c++')} --version fails)"
        self.force = True  # setuptools would keep a library whose time stamp is newer than the sources
        self.build_temp = str(Path(self.build_temp) / f"torch-{torch.__version__}")
        try:
            super().run()
        except Exception as error:  # setuptools, ninja and torch each raise their own kinds
            return f"the compilation failed with {compiler}: {str(error).splitlines()[0]}"
        library = Path(self.get_ext_fullpath(KERNELS)).name
        build_record.write(
            folder,
            library=library,
            sources=build_record.source_hash(),
            torch=torch.__version__,
            compiler=compiler,
        )
        return None


setup(
    packages=[f"tessera.{name}" for name in find_packages(str(ROOT)) if name.split(".")[0] in FOLDERS] + list(SERVING),
    package_dir={f"tessera.{name}": name for name in FOLDERS} | SERVING,
    ext_modules=[kernel_extension()],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if torch is not None else {},
)
