"""Converting an adapter against copying its file, both as whole processes less their start-up, taken in turn.

The start-up of a conversion is the same command on an adapter of one module of each kind of block: it imports all that
the conversion needs, and does next to nothing. That of copying is a process that imports what copies. A conversion
brings its output to the disk (fsync) before it takes its name; the copy does the same, and is timed without as well.

Run: python -m tests.bench.convert
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tests.bench._common import LORATOOLS, PYTHON, flux_shapes, make, shapes, timed

ROUNDS = 9

_IMPORTS = "import os, shutil, sys"
_COPY = f"{_IMPORTS}; shutil.copyfile(sys.argv[1], sys.argv[2])"
_DURABLE = f"{_COPY}; os.fsync(os.open(sys.argv[2], os.O_RDWR))"


class Round(NamedTuple):
    """Seconds beyond start-up.

    Attributes:
        plain: Converting with --no-verify.
        proven: Converting and verifying.
        copied: Copying to the disk.
        cached: Copying, with the data left to the system to write.
        start: The start-up of converting itself.
        proven_start: The same with verifying, which imports torch where bits were regrouped or computed.
    """

    plain: float
    proven: float
    copied: float
    cached: float
    start: float
    proven_start: float


def main() -> None:
    """Print times and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdxl = make(folder / "sdxl.safetensors")
        tiny = make(folder / "tiny.safetensors", modules=[*islice(shapes(), 3), *islice(shapes(), 790, 793)])
        _describe("an SDXL-shaped adapter: 794 modules, rank 32, float16", sdxl)
        for layout in ("diffusers", "comfy", "kohya"):
            _report(f"kohya to {layout}", sdxl, tiny, layout)
        flux = make(folder / "flux.safetensors", rank=16, modules=flux_shapes(), version="flux1")
        few = [*islice(flux_shapes(), 10), *islice(flux_shapes(), 190, 193)]
        tiny = make(folder / "few.safetensors", rank=16, modules=few, version="flux1")
        _describe("a Flux-shaped adapter: 304 modules, 114 of them fused, rank 16, float16", flux)
        _report("kohya to diffusers, which splits", flux, tiny, "diffusers")
        parts = _converted(flux, "diffusers", folder / "parts.safetensors")
        tiny = _converted(tiny, "diffusers", folder / "few_parts.safetensors")
        _describe("the same in parts: 494 modules", parts)
        _report("diffusers to kohya, which fuses", parts, tiny, "kohya")


def _describe(what: str, path: Path) -> None:
    print(f"{what}, {path.stat().st_size / 1e6:.0f} MB")


def _report(what: str, source: Path, tiny: Path, layout: str) -> None:
    _round(source, tiny, layout)
    rounds = [_round(source, tiny, layout) for _ in range(ROUNDS)]
    typical = Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))
    plain = statistics.median(each.plain / each.copied for each in rounds)
    cached = statistics.median(each.plain / each.cached for each in rounds)
    proven = statistics.median(each.proven / each.copied for each in rounds)
    print(f"  {what}: {typical.plain:.2f} s, {plain:.2f} x copying ({typical.copied:.2f} s)", end="")
    print(f" and {cached:.2f} x without fsync ({typical.cached:.2f} s); start-up {typical.start:.2f} s")
    print(f"    with --verify {typical.proven:.2f} s, {proven:.2f} x; start-up {typical.proven_start:.2f} s")


def _round(source: Path, tiny: Path, layout: str) -> Round:
    """All of it once, in turn, so that what else the machine does meets all alike."""
    start = timed([*_command(tiny, layout), "--no-verify"])
    plain = timed([*_command(source, layout), "--no-verify"]) - start
    proven_start = timed(_command(tiny, layout))
    proven = timed(_command(source, layout)) - proven_start
    output = str(source.with_suffix(".copy"))
    bare = timed([PYTHON, "-c", _IMPORTS])
    copied = timed([PYTHON, "-c", _DURABLE, str(source), output]) - bare
    cached = timed([PYTHON, "-c", _COPY, str(source), output]) - bare
    return Round(plain, proven, copied, cached, start, proven_start)


def _command(source: Path, layout: str) -> list[str]:
    output = source.with_suffix(".out.safetensors")
    return [LORATOOLS, "convert", str(source), "-o", str(output), "--to", layout, "--overwrite", "--quiet"]


def _converted(source: Path, layout: str, output: Path) -> Path:
    timed([LORATOOLS, "convert", str(source), "-o", str(output), "--to", layout, "--quiet"])
    return output


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(str(error)) from error
