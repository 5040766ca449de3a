"""Memory does not grow with the input: peak resident memory of two conversions, one of ten times the rows."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import PYTHONPATH

ROOT = Path(__file__).resolve().parents[4]
CODE = """
import resource, sys
from pathlib import Path
from tessera.ctr.data.convert.criteo import convert_criteo
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import Input, Options
options = Options(overwrite=True, block_bytes=1 << 20, writing=Writing(row_group_rows=4096))
peaks = []
for name in ("warm", "small", "large"):
    convert_criteo(Input({"": [Path(name + ".gz")]}), Path("out"), options)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(*peaks)
"""


def test_peak_does_not_grow_with_the_input(tmp_path):
    lines = ["1" + "\t5" * 13 + f"\t{i:08x}" * 26 + "\n" for i in range(12_000)]
    small = gzip.compress("".join(lines).encode(), 1)  # 3 MB of text
    for name, times in (("warm", 1), ("small", 1), ("large", 10)):
        (tmp_path / f"{name}.gz").write_bytes(small * times)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    _, small_peak, large_peak = map(int, done.stdout.split())
    assert large_peak - small_peak < 15, f"MB: {done.stdout}"  # the text is 30 MB longer
