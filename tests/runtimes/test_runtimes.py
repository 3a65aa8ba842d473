import click
import pytest

from loratools import formats
from loratools.cli import cli
from loratools.cli import convert as convert_cli
from loratools.errors import OptionError
from loratools.registry import scan
from loratools.runtimes import FEATURES, get, runtimes
from tests.runtimes import render_docs

ASKED = {"vllm", "sglang", "llama.cpp", "mlx", "peft", "diffusers", "comfyui", "a1111", "lorax"}
FAMILIES = {"language", "speech", "vision", "image"}
EVERY = list(runtimes().values())


def test_every_program_has_its_file():
    assert set(runtimes()) == ASKED


@pytest.mark.parametrize("runtime", EVERY, ids=lambda runtime: runtime.name)
def test_what_is_declared_is_known(runtime):
    assert runtime.title
    assert runtime.source
    assert runtime.families <= FAMILIES
    assert runtime.kinds <= set(scan("loratools.kinds", "KIND"))
    assert {*runtime.refuses, *runtime.ignores} <= set(FEATURES)
    assert not {*runtime.refuses} & {*runtime.ignores}
    assert all({**runtime.refuses, **runtime.ignores}.values())
    assert list(runtime.ranks) == sorted(set(runtime.ranks))
    assert not runtime.usual_rank or runtime.usual_rank in runtime.ranks
    assert not runtime.option or runtime.option.format(7).endswith(" 7")


@pytest.mark.parametrize("runtime", EVERY, ids=lambda runtime: runtime.name)
def test_its_layouts_are_ours(runtime):
    for layout in runtime.layouts:
        # GGUF's is a file of the package's own, of which a build without it has none.
        if layout != "gguf" or layout in scan("loratools.formats", "FORMAT"):
            assert formats.get(layout).name == layout


@pytest.mark.parametrize("runtime", EVERY, ids=lambda runtime: runtime.name)
def test_normal_forms_are_those_that_convert_takes(runtime):
    if runtime.name in scan("loratools.formats", "FORMAT"):
        return  # the layout's own name
    arguments = ["in", "-o", "out", "--to", runtime.name]
    context = click.Context(cli, **cli.context_settings)
    try:
        convert_cli.command.make_context("convert", arguments, parent=context)
    except click.BadParameter:
        taken = False
    else:
        taken = True
    assert runtime.normal is taken, f"{runtime.name}: set normal={taken} in its file"


def test_holding_is_neither_refusing_nor_ignoring():
    vllm = get("vllm")
    assert vllm.holds("rslora")
    assert not vllm.holds("dora")
    assert not vllm.holds("scales")


def test_an_unknown_program_is_answered_with_near_ones():
    with pytest.raises(OptionError, match=r"vlm.*Did you mean: vllm"):
        get("vlm")


def test_the_page_says_what_the_files_declare():
    assert render_docs.PAGE.read_text("utf-8") == render_docs.page(), (
        "run python -m tests.runtimes.render_docs"
    )
