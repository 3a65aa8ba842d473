"""How long `--help` and `info` take beside the least that such a program could do.

Run: python -m tests.bench.startup
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench._common import LORATOOLS, PYTHON, compare, make

BARE = "import click, rich; rich.print('hello')"
READ = "import sys, numpy; numpy.fromfile(sys.argv[1], numpy.uint8)"


def main() -> None:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "sdxl.safetensors")
        size = path.stat().st_size
        print(f"SDXL-shaped adapter: 794 modules, 2382 tensors, rank 32, float16, {size / 1e6:.0f} MB")
        ours = [LORATOOLS]
        bare = [PYTHON, "-c", BARE]
        compare("--help against a Python that imports click and rich and prints", [*ours, "--help"], bare)
        compare("info --no-norms against the same", [*ours, "info", "--no-norms", str(path)], bare)
        read = [PYTHON, "-c", READ, str(path)]
        compare("info with norms against reading the file with numpy", [*ours, "info", str(path)], read)


if __name__ == "__main__":
    main()
