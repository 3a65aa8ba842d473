import pytest
from rich.cells import cell_len

from loratools.report.convert_text import convert_text
from tests.report.samples import convert_report, rendered


def shown(report, width=80, encoding="utf-8", **options):
    return rendered(
        lambda width, symbols: convert_text(report, width=width, symbols=symbols, **options), width, encoding
    )


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal(width, encoding):
    text = shown(convert_report(), width, encoding, dry_run=True)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text or encoding == "utf-8"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_says_what_went_in_and_what_came_out(width):
    # A long value folds, so blanks are left out.
    text = "".join(shown(convert_report(), width).split())
    for part in (
        "layout diffusers (peft-keys) to kohya",
        "architecture flux",
        "304, written as 152",
        "lora ×150, full ×2",
        "16 ×100, 48 ×50",
        "F16 ×304, F32 ×152",
        "152 weights on random inputs, largest difference 4.5e-08",
        "differs most single_blocks.0.linear1",
        "13 modules, 1 exactly; largest error 12.0%",
        "wrote out.safetensors (1.2 MB)",
    ):
        assert part.replace(" ", "") in text
    assert "0×2" not in text


def test_fates_are_told_in_words_and_in_order():
    told = "1 as they were, 1 renamed, 2 fused with others, 1 folded into factors, 8 dropped"
    assert told in words(shown(convert_report()))


def test_what_was_dropped_is_told_by_its_kind():
    text = words(shown(convert_report(), 120))
    assert "7 tensors (extras): [bold]token 0, " in text
    assert "[bold]token 4 and 2 more" in text
    assert "token 5" not in text
    assert "1 tensor (bias): c.diff_b" in text
    assert "dropped" not in shown(convert_report(ledger=convert_report().ledger[:5]))


def test_the_same_note_on_many_weights_is_told_once():
    text = words(shown(convert_report(), 120))
    assert text.count("4 of 7 shares") == 1
    assert "single_blocks.0.linear1: 4 of 7 shares have no module (and 37 more like it)" in text
    assert "Note: double_blocks.0.img_attn.qkv: 1 of 3 shares have no module" in text
    assert "Note: alpha is stale" in text


def test_the_largest_errors_come_first_and_the_others_are_counted():
    text = shown(convert_report(), 120)
    rows = [line for line in text.splitlines() if "input_blocks" in line]
    assert [line.split()[-1] for line in rows] == [f"{number}.0%" for number in range(12, 2, -1)]
    assert "largest errors of 12 modules" in text
    exact = convert_report(conversions=convert_report().conversions[-1:])
    assert "1 module, all exactly" in shown(exact)
    assert "error" not in shown(exact)


def test_a_layout_that_stays_is_named_once():
    text = words(shown(convert_report(source="kohya")))
    assert "layout kohya architecture" in text


def test_whether_it_was_verified_is_said():
    assert "152 weights on random inputs, no difference" in words(shown(convert_report(error=0.0)))
    assert "1 weight on random inputs" in words(shown(convert_report(weights=1)))
    assert "no (--no-verify)" in shown(convert_report(weights=None, error=None))


def test_a_dry_run_says_so():
    text = shown(convert_report(), dry_run=True)
    assert "would write" in text
    assert "nothing was written" in text
    assert "wrote" not in text.replace("would write", "")
