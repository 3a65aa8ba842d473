import json
import math

import pytest
from rich.cells import cell_len

from loratools.ops.checkpoint_results import BakeEstimate
from loratools.report import checkpoint_data, checkpoint_parts, data
from loratools.report.bake_text import bake_text
from loratools.report.extract_text import extract_text
from loratools.report.verify_text import verify_text
from tests.report import checkpoint_samples as samples
from tests.report.samples import rendered


def shown(make, report, width=80, encoding="utf-8", **options):
    return rendered(
        lambda width, symbols: make(report, width=width, symbols=symbols, **options), width, encoding
    )


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal(width, encoding):
    estimate = BakeEstimate(samples.estimate(), 1.2e9, 8e8)
    for text in (
        shown(bake_text, samples.bake_report(), width, encoding),
        shown(bake_text, samples.bake_report(estimate=estimate), width, encoding, dry_run=True),
        shown(extract_text, samples.extract_report(), width, encoding),
        shown(
            extract_text, samples.extract_report(estimate=samples.estimate()), width, encoding, dry_run=True
        ),
        shown(verify_text, samples.verify_report(), width, encoding),
        shown(verify_text, samples.failed_report(notes=("a note " * 30,)), width, encoding),
    ):
        assert max(map(cell_len, text.splitlines())) <= width
        assert encoding == "utf-8" or text.isascii()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bake_says_what_changed_and_what_was_kept(width):
    text = "".join(shown(bake_text, samples.bake_report(), width).split())
    for part in (
        "style.safetensors",
        "0.8",
        "-0.5",
        "architecture sd15",
        "changed 12 tensors, 1.2 GB",
        "copied 1,118 tensors",
        "dtype F16",
        "to nearest, computed in float32",
        "99.93% of the change; rounding error 1.23%",
        "7 modules",
        "and 2 more",
        "time 12.3 s",
        "wrote baked.safetensors (2.1 GB)",
        "Note: the embeddings are untied",
    ):
        assert part.replace(" ", "") in text


def test_the_tensors_that_rounding_took_most_from_come_first():
    text = shown(bake_text, samples.bake_report(), 160)
    rows = [line.split() for line in text.splitlines() if "input_blocks" in line and "%" in line]
    assert [row[-1] for row in rows] == ["22%", "20%", "18%", "16%", "14%"]
    assert "largest rounding errors of 12 tensors" in text
    exact = tuple(tensor._replace(error=0.0) for tensor in samples.bake_report().tensors)
    assert "rounding errors" not in shown(bake_text, samples.bake_report(tensors=exact))


def test_the_same_note_on_many_tensors_is_told_once():
    noted = tuple(samples.baked_tensor(number, note="a new scale") for number in range(3))
    text = words(shown(bake_text, samples.bake_report(tensors=noted), 160))
    assert text.count("a new scale") == 1
    assert "a new scale (and 2 more like it)" in text


def test_a_dry_run_of_a_bake_shows_the_plan_and_the_estimate():
    planned = tuple(samples.baked_tensor(number, kept=None, error=None, norm=0.0) for number in range(12))
    report = samples.bake_report(
        tensors=planned, kept=None, error=None, files=3, estimate=BakeEstimate(samples.estimate(), 1.2e9, 8e8)
    )
    text = words(shown(bake_text, report, dry_run=True))
    assert "speed copies at 1.2 GB/s, computes at 800.0 MB/s" in text
    assert "time about 2 min 05 s with 4 workers" in text
    assert "would write baked.safetensors (2.1 GB, 3 files)" in text
    assert "denoiser 8 F16" in text
    assert "text_encoder 4 F16" in text
    assert "nothing was written" in text
    assert "wrote" not in text
    assert "of the change" not in text


def test_a_resumed_bake_says_so():
    assert "resumed 2 tasks of the interrupted run taken over, 3.0 MB" in words(
        shown(bake_text, samples.bake_report(resumed=2, resumed_bytes=3_000_000))
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_an_extraction_says_what_it_found(width):
    text = "".join(shown(extract_text, samples.extract_report(), width).split())
    for part in (
        "tuned.ckpt",
        "rule energy 0.95",
        "9 (lora ×8, full ×1); 128 more did not change",
        "95.1% of the extracted weights' differences",
        "22.1%; the best possible at these ranks is 22.1%",
        "time 1 min 15 s",
        "wrote tuned-lora-e95.safetensors (kohya layout, F16, 34.6 MB)",
        "Note: the vocabulary is larger",
    ):
        assert part.replace(" ", "") in text


def test_the_largest_errors_of_an_extraction_come_first():
    text = shown(extract_text, samples.extract_report(), 160)
    rows = [line.split() for line in text.splitlines() if "input_blocks" in line]
    assert [row[-2] for row in rows] == ["70%", "60%", "50%", "40%", "30%"]
    assert rows[0][-1] == "69.9%"


def test_what_was_left_out_is_told_by_reason_and_the_largest_first():
    text = shown(extract_text, samples.extract_report(), 160)
    lines = [words(line) for line in text.splitlines()]
    bias = lines.index("a bias; --full-small takes it along 9 9 b.0.bias")
    assert lines[bias + 1] == "of no known component 1 0.5 first_stage_model.a"
    assert "left out" not in shown(extract_text, samples.extract_report(left_out=()))


def test_components_are_summed_by_their_energy():
    modules = (
        samples.extracted_module(0, norm=3.0, error=1.0, component="a"),
        samples.extracted_module(1, norm=4.0, error=0.0, component="a"),
    )
    text = words(shown(extract_text, samples.extract_report(modules=modules), 160))
    assert "a 2 4 ×1, 5 ×1 5 64.0% 60%" in text


def test_a_dry_run_of_an_extraction_has_no_errors_yet():
    text = words(
        shown(
            extract_text,
            samples.extract_report(estimate=samples.estimate(seconds=90.0, workers=1, write_rate=None)),
            dry_run=True,
        )
    )
    assert (
        "time about 1 min 30 s with 1 worker memory 1.5 GB for a worker reads 5.0 GB, at 2.0 GB/s writes 2.5 GB"
        in text
    )
    assert "would write" in text
    assert "energy kept" not in text


def test_a_verification_that_is_good():
    text = words(shown(verify_text, samples.verify_report()))
    assert "baked 12 tensors, as it should be" in text
    assert "untouched 1,118 tensors, as in the base" in text
    assert "kept 100% of the change; error 1.23%" in text
    assert "Baked: every tensor is what it should be." in text
    assert "Not baked" not in text


def test_a_verification_that_failed_shows_the_worst_first():
    text = shown(verify_text, samples.failed_report(), 160)
    rows = [line for line in text.splitlines() if "input_blocks" in line]
    verdicts = [
        next(
            each for each in ("absent", "wrong", "unexpected", "not baked", "partly", "baked") if each in row
        )
        for row in rows
    ]
    assert verdicts == ["absent", "wrong", "unexpected", "not baked", "partly"]
    assert "-40.0%" in rows[1]
    assert "Not baked as it should be: 5 tensors differ." in words(text)
    assert "worst of 17 tensors" in text


def test_components_of_a_verification_are_counted_apart():
    lines = [words(line) for line in shown(verify_text, samples.failed_report(), 160).splitlines()]
    assert any(line.startswith("denoiser 12 3 ") for line in lines)
    assert any(line.startswith("text_encoder 0 1 -40.0% 310%") for line in lines)
    assert "other 0 1" in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (1.0, "100%"),
        (1.0002, "100%"),
        (0.99999, "99.99%"),
        (1.3, "130.0%"),
        (-0.5, "-50.0%"),
        (-1e-6, "0.0%"),
        (0.0, "0.0%"),
        (math.nan, "nan"),
    ],
)
def test_shares(value, text):
    assert checkpoint_parts.share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0%"), (1e-9, "1e-07%"), (1e-4, "0.01%"), (0.5, "50%"), (math.inf, "inf")],
)
def test_errors(value, text):
    assert checkpoint_parts.error(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125.0, "2 min 05 s"),
        (3725.0, "1 h 02 min"),
    ],
)
def test_durations(seconds, text):
    assert checkpoint_parts.duration(seconds) == text


@pytest.mark.parametrize(
    ("make", "report", "nested"),
    [
        (
            checkpoint_data.bake_json,
            samples.bake_report(estimate=BakeEstimate(samples.estimate(), 2.0, 3.0)),
            "tensors",
        ),
        (checkpoint_data.extract_json, samples.extract_report(), "modules"),
        (checkpoint_data.verify_json, samples.failed_report(), "tensors"),
    ],
)
def test_json_has_every_field_of_a_report(make, report, nested):
    found = json.loads(data.dumps(make(report)))
    assert set(report._fields) <= set(found)
    items = getattr(report, nested)
    assert [set(each) for each in found[nested]] == [set(item._fields) for item in items]
    assert found["arch"] == report.arch


def test_an_estimate_says_what_workers_hold_together():
    text = words(shown(extract_text, samples.extract_report(estimate=samples.estimate()), 160, dry_run=True))
    assert "memory 1.5 GB for a worker; 4.0 GB in all" in text
    assert "writes 2.5 GB, at 400.0 MB/s" in text


def test_json_has_every_field_of_an_estimate():
    estimate = samples.estimate()
    fields = json.loads(data.dumps(estimate._asdict()))
    extracted = json.loads(
        data.dumps(checkpoint_data.extract_json(samples.extract_report(estimate=estimate)))
    )
    assert extracted["estimate"] == fields
    report = samples.bake_report(estimate=BakeEstimate(estimate, 2.0, math.inf))
    baked = json.loads(data.dumps(checkpoint_data.bake_json(report)))
    assert baked["estimate"] == {**fields, "copy_rate": 2.0, "compute_rate": None}


def test_json_keeps_values():
    found = json.loads(
        data.dumps(checkpoint_data.bake_json(samples.bake_report(kept=math.nan), dry_run=True))
    )
    assert found["kept"] is None
    assert found["dry_run"] is True
    assert found["estimate"] is None
    assert found["missing"] == [[], list(samples.bake_report().missing[1])]
    assert found["tensors"][1]["kept"] == 0.99
    extracted = json.loads(data.dumps(checkpoint_data.extract_json(samples.extract_report())))
    assert extracted["ranks"] == {str(4 + number): 1 for number in range(8)}
    assert extracted["left_out"][0] == {
        "key": "first_stage_model.a",
        "why": "of no known component",
        "norm": 0.5,
    }
