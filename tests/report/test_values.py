import math

import pytest

from loratools.report import values
from loratools.report.values import ASCII, UNICODE


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [
        (0.0, "0.0%"),
        (0.29, "29.0%"),
        (0.5, "50.0%"),
        (0.98999, "98.9%"),
        (0.9997, "99.97%"),
        (0.999999999, "99.99%"),
        (1.0, "100%"),
        (None, ""),
        (math.nan, "nan"),
    ],
)
def test_a_percentage_is_rounded_down(fraction, shown):
    assert values.percentage(fraction) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (170_543_210, "170.5 MB"),
    ],
)
def test_sizes_are_decimal(count, shown):
    assert values.size(count) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.0, "0"),
        (1.0, "1"),
        (0.43281, "0.4328"),
        (25.6399, "25.64"),
        (12345.6, "1.23e+04"),
        (1.234e-5, "1.23e-05"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_digits_at_most(value, shown):
    assert values.number(value) == shown


def test_text_from_files_cannot_steer_the_terminal():
    shown = values.clean("a\x1b[31mb\r\n\tc\ud800d\u202ee")
    assert shown == r"a\x1b[31mb\r\n\tc\ud800d\u202ee"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "‖ΔW‖² = Σ σ² ≤ 1, é 中"),
        ("latin-1", r"||dW||² = sum s² <= 1, é \u4e2d"),
        ("cp1253", r"||ΔW||² = Σ σ² <= 1, \xe9 \u4e2d"),
        ("ascii", r"||dW||^2 = sum s^2 <= 1, \xe9 \u4e2d"),
        (None, r"||dW||^2 = sum s^2 <= 1, \xe9 \u4e2d"),
        ("no such", r"||dW||^2 = sum s^2 <= 1, \xe9 \u4e2d"),
    ],
)
def test_what_an_output_lacks_has_twins_or_escapes(encoding, shown):
    assert values.fitted("‖ΔW‖² = Σ σ² ≤ 1, é 中", encoding) == shown


def test_counts_name_the_commonest_first():
    assert values.counts({"F16": 7}, UNICODE) == "F16"
    assert values.counts({"F32": 3, "F16": 722}, UNICODE) == "F16 ×722, F32 ×3"
    assert values.counts({rank: 9 - rank for rank in range(6)}, ASCII, limit=2) == "0 x9, 1 x8, 4 more"


def test_ranks():
    assert values.ranks({}, UNICODE) == ""
    assert values.ranks({32: 722}, UNICODE) == "32"
    assert values.ranks({8: 4, 16: 192}, UNICODE) == "16 ×192, 8 ×4"
    assert values.ranks({8: 4, 16: 192, 2: 1}, UNICODE) == "2–16"


def test_a_histogram_has_a_bar_per_rank():
    assert values.histogram({4: 1, 8: 8, 16: 4}, UNICODE) == "4 ▁█▄ 16"
    assert values.histogram({4: 1, 8: 8, 16: 4}, ASCII) == "4 .@= 16"


def test_a_histogram_of_many_ranks_is_binned_and_keeps_gaps():
    found = dict.fromkeys(range(1, 25), 1) | {240: 24}
    bars = values.histogram(found, UNICODE).removeprefix("1 ").removesuffix(" 240")
    assert len(bars) == 24
    assert bars[-1] == "█"
    assert bars.count(" ") == 24 - 3 - 1


@pytest.mark.parametrize(
    ("encoding", "symbols"),
    [("utf-8", UNICODE), ("ascii", ASCII), ("latin-1", ASCII), (None, ASCII), ("none", ASCII)],
)
def test_symbols_that_the_encoding_can_show(encoding, symbols):
    found = values.symbols_for(encoding)
    assert found[:-1] == symbols[:-1]
    assert found.encoding == (encoding or "ascii")
