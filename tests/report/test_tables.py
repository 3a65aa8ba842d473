import pytest
from rich.cells import cell_len

from loratools.report.tables import Column, fitted, folded, pairs, table, wrapped
from tests.report.samples import rendered

COLUMNS = [
    Column("name", ["a/long/path/of/a/file.safetensors", "b"], fold=12),
    Column("first", ["1,234", "5"], right=True, priority=2),
    Column("second", ["0.5", ""], priority=1),
    Column("empty", ["", ""]),
    Column("kept", ["123456789", "1"], right=True),
]


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_no_line_is_wider_than_asked_and_no_number_is_cut(width):
    text = rendered(lambda width, symbols: table(COLUMNS, width=width, symbols=symbols), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "123456789" in text
    assert "empty" not in text


def test_columns_go_by_priority_and_are_named():
    kept, dropped = fitted(COLUMNS, 40)
    assert [column.head for column in dropped] == ["first"]
    assert [column.head for column in kept] == ["name", "second", "empty", "kept"]
    text = rendered(lambda width, symbols: table(COLUMNS, width=width, symbols=symbols), 32)
    assert "no room for: first" in text


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("short", 10, ["short"]),
        ("folder/file.safetensors", 12, ["folder/", "file.", "safetensors"]),
        ("blocks.0.attn2.to_out.0", 12, ["blocks.0.", "attn2.", "to_out.0"]),
        ("x" * 10, 4, ["xxxx", "xxxx", "xx"]),
        ("日本語の名前", 5, ["日本", "語の", "名前"]),
    ],
)
def test_names_fold_after_separators(name, width, lines):
    assert folded(name, width).split("\n") == lines


def test_a_narrower_line_than_one_character_still_ends():
    assert folded("日本", 1) == "日\n本"


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("out/style.safetensors (870.0 kB)", 26, ["out/style.safetensors", "(870.0 kB)"]),
        ("722 renamed, 8 split from fused weights", 19, ["722 renamed,", "8 split from fused", "weights"]),
        ("F16 ×722, F32 ×3", 10, ["F16 ×722,", "F32 ×3"]),
        ("2 tensors: a.long.key, another.key", 16, ["2 tensors:", "a.long.key,", "another.key"]),
        ("see blocks.0.attn2.to_out.0 here", 12, ["see", "blocks.0.", "attn2.", "to_out.0", "here"]),
        ("short", 10, ["short"]),
        ("", 10, [""]),
    ],
)
def test_prose_breaks_between_words_and_keeps_numbers_whole(text, width, lines):
    assert wrapped(text, width).split("\n") == lines


@pytest.mark.parametrize("width", range(20, 90, 7))
def test_values_keep_their_numbers_and_units_at_any_width(width):
    rows = [("wrote", "some/folder/of/mine/style_diffusers.safetensors (870.0 kB)")]
    text = rendered(lambda width, _: pairs(rows, width=width), width)
    assert "(870.0 kB)" in text
    assert max(map(cell_len, text.splitlines())) <= width


def test_a_name_folds_even_where_there_is_no_room():
    assert folded("ab", -1) == "a\nb"
