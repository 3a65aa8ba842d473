import json
import math

import pytest
from rich.cells import cell_len

from loratools.ops.compare_results import (
    ComparedAdapter,
    ComparedPair,
    CompareReport,
    ModulePair,
    Relation,
    Suggestion,
)
from loratools.report.compare_data import compare_json
from loratools.report.compare_text import compare_text
from loratools.report.data import dumps
from tests.report.samples import TARGET, rendered

RELATION = Relation(0.1234, 0.5, 1.2, 0.25, 0.5, 0.05, 0.125, 0.4375)
NOTHING = Relation(None, 0.0, 1.0)


def adapter(number, **changes):
    given = {
        "path": f"/loras/style-{number}.safetensors",
        "layout": "kohya",
        "kinds": {"lora": 264},
        "ranks": {16: 192, 4: 72},
        "weight": 1.0,
        "targets": 264,
        "norm": 12.5,
        "missing": (),
    }
    return ComparedAdapter(**{**given, **changes})


def pair(first=0, second=1, **changes):
    modules = (
        ModulePair(TARGET.format(3), "denoiser", (1.0, 0.5), (16, 4), 12.25, 3.5, RELATION),
        ModulePair(TARGET.format(5), "denoiser", (1.0, 0.0), (16, 0), None, None, NOTHING),
    )
    given = {
        "first": first,
        "second": second,
        "shared": 264,
        "verdict": "different",
        "multiple": 0.25,
        "tolerance": 1e-6,
        "relation": RELATION,
        "components": {"denoiser": RELATION, "text_encoder": NOTHING},
        "modules": modules,
    }
    return ComparedPair(**{**given, **changes})


def report(count=2, **changes):
    cosines = tuple(tuple(1.0 if i == j else (i - j) / 100 for j in range(count)) for i in range(count))
    given = {
        "adapters": tuple(adapter(number) for number in range(count)),
        "arch": "sdxl",
        "targets": 264,
        "cosines": cosines,
        "distances": tuple(tuple(0.0 if i == j else 1.5 for j in range(count)) for i in range(count)),
        "same": (),
        "pairs": tuple(pair(i, j) for i in range(count) for j in range(i + 1, count)),
        "sampled_rows": 64,
        "suggestion": Suggestion(
            "tsv", (1.0, 0.5), ("They share much.",), {"mean cosine": 0.1, "overlap": None}
        ),
        "notes": ("2 tensors that belong to no module were not compared",),
    }
    return CompareReport(**{**given, **changes})


def text_of(found, width=80, encoding="utf-8"):
    return rendered(lambda width, symbols: compare_text(found, width=width, symbols=symbols), width, encoding)


def flat(text):
    return " ".join(text.split())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("count", [2, 3, 12, 100])
def test_nothing_is_wider_than_the_terminal(width, encoding, count):
    changes = {"pairs": ()} if count > 16 else {}
    text = text_of(report(count, **changes), width, encoding)
    assert max(map(cell_len, text.splitlines())) <= width
    if encoding == "ascii":
        assert text.isascii()


def test_two_adapters_are_told_in_full():
    text = flat(text_of(report(), width=160))
    for part in (
        "different adapters (distance 120%, rounding 1e-04% at most)",
        "cosine 0.123",
        "norm ratio 0.5",
        "overlap of outputs 25.0% (by chance 5.0%)",
        "of inputs 50.0% (by chance 12.5%)",
        "sign conflict 43.7%",
        "at most 64 rows",
        "denoiser",
        "overall",
        "12.2 deg",
        TARGET.format(3),
        "Suggested: --method tsv --weights 1,0.5",
        "They share much. It rests on: mean cosine 0.1.",
        "Note: 2 tensors that belong to no module",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("same", "the same adapter (distance 120%"),
        ("scaled", "2 is 0.25 times 1"),
        ("zero", "one of them changes nothing"),
    ],
)
def test_verdicts_are_words(verdict, words):
    assert words in flat(text_of(report(pairs=(pair(verdict=verdict, modules=()),)), width=160))


def test_exact_figures_do_not_speak_of_samples():
    assert "--exact" in text_of(report())
    assert "--exact" not in text_of(report(sampled_rows=0))


def test_what_is_missing_is_named_and_the_rest_counted():
    lacking = tuple(TARGET.format(number) for number in range(7))
    text = flat(text_of(report(adapters=(adapter(0), adapter(1, missing=lacking))), width=160))
    assert "2 lacks" in text
    assert "and 2 more; counted as 0" in text


def test_a_matrix_of_few_and_the_extremes_of_many():
    few = text_of(report(4))
    assert "cosines" in few
    assert "most alike" not in few
    many = text_of(report(20, pairs=(), same=((0, 3), (5, 6, 7))))
    assert "most alike of 190 pairs" in many
    assert "most opposed of 190 pairs" in many
    assert "-0.190" in many
    assert "1, 4" in many
    assert "6, 7, 8" in many


def test_opposed_pairs_are_shown_only_where_there_are_some():
    cosines = tuple(tuple(1.0 if i == j else 0.5 for j in range(20)) for i in range(20))
    assert "most opposed" not in text_of(report(20, pairs=(), cosines=cosines))


def test_only_equal_directions_have_a_cosine_of_one():
    near = ((1.0, 0.99999), (0.99999, 1.0), (-1.0, -0.99999))
    cosines = tuple((*row, 0.0) for row in near)
    text = text_of(report(3, cosines=cosines))
    assert "0.999" in text
    assert "-0.999" in text
    assert "-1.000" in text


def test_an_adapter_that_changes_nothing_keeps_its_place_in_the_matrix():
    cosines = ((None, None, None), (None, 1.0, -1e-5), (None, -1e-5, 1.0))
    lines = text_of(report(3, cosines=cosines), width=60).splitlines()
    at = next(index for index, line in enumerate(lines) if line.split() == ["cosines"])
    assert lines[at + 1].split() == ["1", "2", "3"]
    assert lines[at + 3].split() == ["1", "–", "–", "–"]
    assert lines[at + 4].split() == ["2", "–", "1.000", "0.000"]


def test_names_cannot_steer_the_terminal():
    evil = adapter(0, path="\x1b[31mred", layout="\x1b]0;title\x07", missing=("\x1b[2J",))
    assert "\x1b" not in text_of(report(adapters=(evil, adapter(1))), width=160)


def test_json_is_flat_strict_and_whole():
    broken = RELATION._replace(distance=math.nan)
    document = json.loads(dumps(compare_json(report(pairs=(pair(relation=broken),)))))
    (found,) = document["pairs"]
    assert found["distance"] is None
    assert found["cosine"] == 0.1234
    assert "relation" not in found
    assert found["components"]["text_encoder"]["cosine"] is None
    assert found["modules"][0]["row_overlap"] == 0.5
    assert found["modules"][1]["column_angle"] is None
    assert document["suggestion"]["weights"] == [1.0, 0.5]
    assert document["adapters"][1]["ranks"] == {"16": 192, "4": 72}
    assert document["same"] == []
    assert json.loads(dumps(compare_json(report(suggestion=None))))["suggestion"] is None
