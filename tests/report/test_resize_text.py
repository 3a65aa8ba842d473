"""What a resize's report shows, at every width and without Unicode."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from loratools.ops.resize_results import ResizedModule, ResizeReport
from loratools.report import values
from loratools.report.resize_data import resize_json
from loratools.report.resize_text import resize_text

MODULES = (
    ResizedModule("input_blocks.1.1.proj_in", "denoiser", "lora", 64, 16, 0.75, 0.5, 3.0, (320, 320)),
    ResizedModule("input_blocks.1.1.proj_out", "denoiser", "lora", 64, 4, 1.0, 1e-6, 4.0, (320, 320)),
    ResizedModule("norm_out", "denoiser", "full", None, None, 1.0, 0.0, 0.0, (320,), changed=False),
    ResizedModule("text_model.layers.0.mlp.fc1", "text_encoder", "dora", 32, 16, 0.9, 0.3, 0.0, (64, 32)),
)
REPORT = ResizeReport(
    rule="energy 0.9",
    input="style.safetensors",
    output="small.safetensors",
    bytes_before=40_000_000,
    bytes=10_000_000,
    layout="kohya",
    arch="sd15",
    modules=MODULES,
    curves={"denoiser": {1: 0.5, 2: 0.75, 4: 1.0}, "text_encoder": {1: 1.0}},
    dropped=("conv_in",),
    carried=("lm_head.weight",),
    dtypes={"F16": 7},
    notes=("one module is zero throughout",),
)


def shown(report=REPORT, width=100, symbols=values.UNICODE, **options):
    console = Console(width=width, file=None, color_system=None)
    with console.capture() as captured:
        console.print(resize_text(report, width=width, symbols=symbols, **options))
    return captured.get()


def test_everything_that_matters_is_said():
    text = shown()
    for part in (
        "energy 0.9",
        "4, 1 of them as they were",
        "64 ×2, 32 ×1 before, 16 ×2, 4 ×1 now",
        "40.0 MB before, 10.0 MB now (25.0%)",
        "1 module: conv_in",
        "1 tensor of no module: lm_head.weight",
        "wrote",
        "small.safetensors (kohya layout)",
        "Note: one module is zero throughout",
    ):
        assert part in text
    assert "by rank" not in text


def test_what_is_kept_is_weighed_by_norms():
    # 3² · 0.75 and 4² · 1 of 3² + 4²; the errors 0.5 · 3 of a norm of 5.
    assert REPORT.energy == pytest.approx((9 * 0.75 + 16) / 25)
    assert REPORT.error == pytest.approx(1.5 / 5, rel=1e-6)
    assert "energy kept 91.0% error 30% of what the input changes" in " ".join(shown().split())
    assert REPORT._replace(modules=MODULES[2:3]).energy == 1.0
    assert REPORT._replace(modules=MODULES[2:3]).error == 0.0


def test_a_file_that_grows_is_more_than_the_whole():
    assert "10.0 MB before, 13.3 MB now (133%)" in shown(
        REPORT._replace(bytes_before=10_000_000, bytes=13_300_000)
    )


def test_a_dry_run_says_so():
    text = shown(dry_run=True)
    assert "would write" in text
    assert "nothing was written" in text


def test_the_plot_has_bars_of_the_energy():
    lines = shown(plot=True).splitlines()
    start = next(number for number, line in enumerate(lines) if "energy kept by rank: denoiser" in line)
    bars = [line.count("█") for line in lines[start + 3 : start + 6]]
    assert bars[0] > 0
    assert bars == [bars[2] // 2, bars[2] * 3 // 4, bars[2]]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("symbols", [values.UNICODE, values.ASCII])
def test_nothing_is_wider_than_the_terminal(width, symbols):
    text = shown(width=width, symbols=symbols, plot=True)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    if symbols is values.ASCII:
        assert text.isascii()


def test_control_characters_cannot_steer_the_terminal():
    hostile = MODULES[0]._replace(target="a\x1b[31mb")
    assert "\x1b" not in shown(REPORT._replace(modules=(hostile,), input="x\x1b]0;y\x07"))


def test_the_document_holds_every_field():
    found = resize_json(REPORT, dry_run=True)
    assert json.loads(json.dumps(found)) == found
    assert set(ResizeReport._fields) <= set(found)
    assert set(found["modules"][0]) == set(ResizedModule._fields)
    assert found["components"]["denoiser"]["rank"] == [16, 4, None]
    assert found["curves"]["denoiser"] == {"1": 0.5, "2": 0.75, "4": 1.0}
    assert (found["dry_run"], found["energy"]) == (True, REPORT.energy)
