import json
import math

import pytest

from loratools.report import data
from loratools.report.merge_data import merge_json
from tests.report.samples import component, info, merge_report, module

CONTRACT = {
    "path",
    "bytes",
    "type",
    "layout",
    "arch",
    "kinds",
    "components",
    "modules",
    "tensors",
    "unclaimed",
    "metadata",
    "warnings",
    "error",
}
MODULE_CONTRACT = {
    "target",
    "component",
    "kind",
    "shape",
    "rank",
    "alpha",
    "scale",
    "norm",
    "spectral_norm",
    "stable_rank",
    "dtype",
    "dora",
}


def strictly(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_promised_fields_are_there():
    found = data.info_json(info())
    assert found.keys() >= CONTRACT
    assert found["modules"][0].keys() >= MODULE_CONTRACT
    assert found["components"]["denoiser"].keys() >= {"modules", "ranks", "norm"}
    assert found["components"]["text_encoder_2"]["ranks"] == {"4": 72}
    assert found["modules"][0]["shape"] == [1280, 2048]
    assert found["modules"][0]["experts"] is None
    assert found["error"] is None


def test_not_a_number_becomes_null():
    found = info(
        modules=(module(0, norm=math.nan, alpha=math.inf, energy={1: math.nan}),),
        components={"denoiser": component(norm=-math.inf)},
        training={"rate": math.nan},
    )
    back = strictly(data.dumps(data.info_json(found)))
    assert back["modules"][0]["norm"] is None
    assert back["modules"][0]["alpha"] is None
    assert back["modules"][0]["energy"] == {"1": None}
    assert back["components"]["denoiser"]["norm"] is None
    assert back["training"] == {"rate": None}


def test_any_text_is_written_in_ascii_and_comes_back():
    text = data.dumps({"名": "\ud800\x1b"})
    assert text.isascii()
    assert strictly(text) == {"名": "\ud800\x1b"}


def test_values_that_json_lacks_are_written_as_text():
    assert data.strict({"bytes": b"x", 3: {1.5}, "flag": True}) == {
        "bytes": "b'x'",
        "3": "{1.5}",
        "flag": True,
    }


def test_a_merge():
    found = strictly(data.dumps(merge_json(merge_report(energy=math.nan), dry_run=True)))
    assert found["dry_run"] is True
    assert found["energy"] is None
    assert found["error"] is None
    assert found["ranks"] == {"4": 1, "8": 1, "16": 1}
    assert found["inputs"][1]["weight"] == -0.5
    assert found["modules"][0] == {
        "target": "a",
        "component": "denoiser",
        "inputs": [0, 1],
        "rank": 8,
        "energy": 0.75,
        "shape": None,
        "before": [16, 4],
        "norm": 3.0,
    }


def test_a_merge_says_by_component_what_was_kept():
    found = strictly(data.dumps(merge_json(merge_report(energy=0.9375))))
    assert found["error"] == 0.25
    denoiser = found["components"]["denoiser"]
    assert (denoiser["modules"], denoiser["rank_before"], denoiser["rank"]) == (2, [[16, 4], [4]], [8, 4])
    # 9 of 12 and all of 4 are left of 16.
    assert denoiser["energy"] == pytest.approx(13 / 16)
    assert denoiser["error"] == pytest.approx((3 / 16) ** 0.5)
    assert found["components"]["text_encoder"]["energy"] == pytest.approx(0.5)
