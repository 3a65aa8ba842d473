import pytest
from rich.cells import cell_len

from loratools.report.info_text import TYPES, info_text
from loratools.report.merge_text import merge_text
from loratools.report.table_text import short_paths, table_text
from tests.report.samples import component, info, merge_report, module, rendered

WIDTHS = [80, 160]


def one(found, width=80, encoding="utf-8", **options):
    return rendered(
        lambda width, symbols: info_text(found, width=width, symbols=symbols, **options), width, encoding
    )


def several(infos, width=80, encoding="utf-8", **options):
    return rendered(
        lambda width, symbols: table_text(infos, width=width, symbols=symbols, **options), width, encoding
    )


def merged(report, width=80, encoding="utf-8", **options):
    return rendered(
        lambda width, symbols: merge_text(report, width=width, symbols=symbols, **options), width, encoding
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_terminal(width, encoding):
    for text in (
        one(info(), width, encoding, modules=True),
        several([info(), info(path="b.safetensors", error="broken " * 30)], width, encoding),
        merged(merge_report(), width, encoding, dry_run=True),
    ):
        assert max(map(cell_len, text.splitlines())) <= width
        assert "…" not in text or encoding == "utf-8"


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_and_headings_are_whole(width):
    text = one(info(), width)
    for part in (
        "component",
        "modules",
        "rank",
        "norm",
        "spectral",
        "1.23e+04",
        "1.23e-05",
        "722",
        "99.97%",
        "170.5 MB",
        "2,166 tensors (F16 ×2,000, F32 ×166)",
        "Stable Diffusion XL",
        "(malformed)",
    ):
        assert part in text
    assert "4 ▂█▁▁ 32" in text


def test_training_shows_what_people_look_for():
    text = one(info())
    assert "150ef207aad0…" in text
    assert "150ef207aad01" not in text
    assert "tag 0 ×99" in text
    assert "and 10 more" in text
    assert "tag 10" not in text
    assert "1 field (all of them: --json)" in text


def test_warnings_and_tensors_of_no_module():
    text = one(info())
    assert "Warning: the metadata says rank 16" in text
    assert "7 tensors belong to no module" in text
    assert "… and 2 more" in text


def test_modules_are_listed_only_when_asked_for():
    assert "denoiser: 30 modules" not in one(info())
    wide = one(info(), 160, modules=True)
    assert "denoiser: 30 modules" in wide
    assert module(29).target in wide
    assert "1280x2048" in wide


@pytest.mark.parametrize("kind", sorted(set(TYPES) - {"adapter"}))
def test_what_is_no_adapter_is_never_called_a_lora(kind):
    text = one(info(type=kind, components={}, modules=(), kinds={}, arch="unknown"))
    assert "not a LoRA" in text
    assert TYPES[kind] in text
    assert "Adapter ·" not in text
    assert "belong to no module" not in text


def test_every_type_that_is_told_apart_has_words():
    from loratools.formats import _classify

    assert TYPES.keys() == _classify.TITLES.keys()


def test_dora_is_said():
    assert "lora (all DoRA)" in one(
        info(kinds={"lora": 2}, modules=(module(0, dora=True), module(1, dora=True)))
    )
    assert "lora (1 DoRA)" in one(info(kinds={"lora": 2}, modules=(module(0, dora=True), module(1))))


def test_markup_in_names_is_text():
    text = one(info(path="[red]a.safetensors", components={"[bold]x": component()}, warnings=("[/nothing]",)))
    for part in ("[red]a.safetensors", "[bold]x", "[/nothing]"):
        assert part in text


def test_a_table_tells_errors_in_full_once():
    broken = info(
        path="loras/broken.safetensors", error="loras/broken.safetensors: cut short. Download it again."
    )
    text = several([info(path="loras/good.safetensors"), broken], 120)
    assert "unreadable" in text
    assert "good.safetensors" in text
    assert text.count("Download it again.") == 1
    assert "Download" not in several([info(), broken], 120, told={broken.path})


def test_paths_lose_the_folder_they_share():
    assert short_paths(["a/b/c.x", "a/b/d/e.x"]) == ["c.x", "d/e.x"]
    assert short_paths(["a/b.x"]) == ["a/b.x"]
    assert short_paths(["/a/b.x", "c.x"]) == ["/a/b.x", "c.x"]
    assert short_paths(["b.x", "c.x"]) == ["b.x", "c.x"]


def test_a_merge_says_what_went_in_and_what_was_lost():
    text = merged(merge_report(dropped=("head.weight",)), 100)
    for part in (
        "style.safetensors",
        "0.8",
        "-0.5",
        "ties, density 0.3, lambda 1.0",
        "99.97% of",
        "4 ×3, 16 ×2 before, 4 ×1, 8 ×1, 16 ×1 now",
        "1.73% of that, before rounding",
        "23.5 MB",
        "2 of them in all",
        "1 tensor of no module: <token>",
        "head.weight",
        "Note: alpha is stale",
        "wrote",
        "out.safetensors (kohya layout, 1.2 MB)",
    ):
        assert part in text
    assert "100%" not in text


def test_a_dry_run_says_so():
    text = merged(merge_report(), dry_run=True)
    assert "would write" in text
    assert "nothing was written" in text
    assert "wrote" not in text.replace("would write", "")
