"""Converting an SDXL-shaped adapter of rank 32 against copying the file, in one run.

Each time is a whole process less a start-up: for the conversion that of ``loratools --version`` with the imports that
any conversion needs, for the copy that of a process that copies nothing.

Run: python -m tests.bench.convert
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from pathlib import Path

from tests.bench._common import PYTHON, make, timed

RUNS = 9

_COPY = "import sys, shutil; shutil.copyfile(sys.argv[1], sys.argv[2])"
_START = "import loratools.cli, loratools.ops.convert, numpy"


def main() -> None:
    """Print times and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make(folder / "kohya.safetensors", rank=32)
        size = source.stat().st_size
        print(f"an SDXL-shaped adapter: 794 modules, rank 32, float16, {size / 1e6:.0f} MB")
        start = _median([PYTHON, "-c", _START])
        bare = _median([PYTHON, "-c", "import sys, shutil"])
        copy = _median([PYTHON, "-c", _COPY, str(source), str(folder / "copy.safetensors")]) - bare
        print(f"copying the file: {copy:.3f} s")
        for layout in ("diffusers", "comfy", "kohya"):
            command = [
                PYTHON,
                "-m",
                "loratools",
                "convert",
                str(source),
                "--to",
                layout,
                "--overwrite",
                "--quiet",
            ]
            command += ["-o", str(folder / f"{layout}.safetensors")]
            plain = _median([*command, "--no-verify"]) - start
            proven = _median(command, runs=3) - start
            print(
                f"convert --to {layout}: {plain:.3f} s beyond start-up, {plain / copy:.2f} x copying; "
                f"with --verify {proven:.2f} s"
            )


def _median(command: list[str], runs: int = RUNS) -> float:
    timed(command)
    return statistics.median(timed(command) for _ in range(runs))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(str(error)) from error
