"""Layouts asked for by name, and what goes through them beside LoRA's factors: tokens, scales, trained multipliers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.ops.convert import convert
from tests.formats.travelling import ISSUED, SAID, again, kohya, numbered_unet, pairs, read, through

# Layouts of language models alone, which have tests of their own.
LANGUAGE = {"gguf", "mlx", "torchtune"}

# Tokens


TOKENS = {f"bundle_emb.<s{n}>.string_to_param.*": torch.arange(768.0).reshape(1, 768) * n for n in (1, 2)}


@pytest.mark.parametrize(
    "route", [("cloneofsimo", "kohya"), ("comfy", "cloneofsimo", "comfy"), ("comfy", "kohya")]
)
def test_tokens_travel_and_come_back_the_same(route: tuple[str, ...]) -> None:
    modules = [(f"lora_unet_{name.replace('.', '_')}", shape) for name, shape in numbered_unet()]
    tensors = {**pairs(modules, "lora_up.weight", "lora_down.weight"), **TOKENS}
    adapter = read(tensors, SAID, "sd15")
    for layout in route:
        adapter = through(adapter, layout)
        named = {f"<s{n}>" for n in (1, 2)} if layout == "cloneofsimo" else set(TOKENS)
        assert set(adapter.extras) == named
        marked = {key for key, value in adapter.metadata.items() if value == "<embed>"}
        assert marked == (named if layout == "cloneofsimo" else set())
    assert {key: (ref.shape, bytes(ref.raw())) for key, ref in adapter.extras.items()} == {
        key: (tuple(tensor.shape), tensor.numpy().tobytes()) for key, tensor in TOKENS.items()
    }


@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_a_real_first_file_comes_back_with_its_tokens(layout: str, shared: Path) -> None:
    (path,) = (shared / "corpus" / "cloneofsimo-safetensors").rglob("*.safetensors")
    first = lt.load(path)
    back = through(through(first, layout), "cloneofsimo")
    assert set(first.extras) == set(back.extras) == {"<s1>", "<s2>"}
    assert {key: first.extras[key].raw() for key in first.extras} == {
        key: back.extras[key].raw() for key in back.extras
    }
    assert set(back.modules) == set(first.modules)
    for target, module in first.modules.items():
        assert back.modules[target].factors["up"].raw() == module.factors["up"].raw()
        assert back.modules[target].factors["down"].raw() == module.factors["down"].raw()
    # The classes that were searched are those that the trainer has names for, whatever the library calls them now.
    classes = {"unet", "text_encoder"}
    assert {key: back.metadata[key] for key in first.metadata.keys() - classes} == {
        key: value for key, value in first.metadata.items() if key not in classes
    }


def test_numbers_and_marks_are_said_where_they_mean_something() -> None:
    start = through(kohya("cloneofsimo", SAID), "cloneofsimo")
    assert start.metadata["unet:0:rank"] == "1"
    there = convert(start, "kohya").document.metadata
    assert not [key for key in there if key == "unet" or key.endswith(":rank")]
    assert (
        through(again(convert(start, "kohya"), "sd15"), "cloneofsimo").metadata.items()
        >= start.metadata.items()
    )


# Names of layouts


def test_the_layouts_that_can_be_asked_for_are_known() -> None:
    assert set(formats.writable()) - LANGUAGE == set(ISSUED)


@pytest.mark.parametrize("layout", ISSUED)
def test_what_a_layout_wrote_is_recognised(layout: str, tmp_path: Path) -> None:
    if layout == "sam":
        stems = {
            f"w_{role}_{number:03d}": shape
            for number in range(24)
            for role, shape in (("a", (1, 768)), ("b", (768, 1)))
        }
        make.write_safetensors(
            tmp_path / "a.safetensors", {key: torch.ones(shape) for key, shape in stems.items()}, None
        )
        adapter = replace(lt.load(tmp_path / "a.safetensors"), order=())
    else:
        adapter = replace(kohya(layout, SAID), order=())
    path = tmp_path / ("b" if formats.get(layout).folder else "b.safetensors")
    lt.save(adapter, path, layout=layout)
    found = lt.load(path)
    assert found.layout.name in (layout, *formats.get(layout).reads_as)
    # Flux's own blocks are those of its relatives, and bare names of one tower those of many.
    assert found.arch in (adapter.arch, "unknown")


# Layouts that may go without a scale


@pytest.mark.parametrize("ranks", [{}, {"attn2": 8}])
def test_folding_leaves_a_configuration_of_ones(ranks: dict[str, int], tmp_path: Path) -> None:
    """diffusers without the header takes alpha = rank; with it, the header says the same of every module."""
    made = make.kohya(
        tmp_path / "a.safetensors", "sd15", rank=4, alpha=3.0, ranks=ranks, only=["attn1", "attn2"]
    )
    adapter = lt.load(made.path)
    folded = convert(adapter, "diffusers", fold=True).document
    header = json.loads(folded.metadata["lora_adapter_metadata"])
    assert header["unet.lora_alpha"] == header["unet.r"]
    assert header["unet.alpha_pattern"] == header["unet.rank_pattern"]
    assert bool(header["unet.rank_pattern"]) == bool(ranks)
    refs = {ref.name: ref for ref in folded.tensors}
    for metadata in (folded.metadata, {}):
        make.assert_close(make.deltas_of(formats.read(refs, metadata=metadata, arch="sd15")), made.deltas)


# LyCORIS' trained multiplier


@pytest.mark.parametrize("layout", ["kohya", "comfy", "onetrainer", "lycoris"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr_full", "glora"])
@pytest.mark.parametrize("scalar", [0.3, 0.0])
def test_a_trained_multiplier_is_part_of_the_scale(
    kind: str, scalar: float, layout: str, tmp_path: Path
) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", kind=kind, alpha=2.0, rank=4, only=["attn1_to_q"])
    plain = lt.load(made.path, arch="sd15")
    (stem,) = {key.partition(".")[0] for key in made.tensors}
    tensors = {**made.tensors, f"{stem}.scalar": torch.tensor(scalar)}
    make.write_safetensors(tmp_path / "b.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "b.safetensors", arch="sd15")
    (before,), (module,) = plain.modules.values(), adapter.modules.values()
    assert module.scale == pytest.approx(scalar * before.scale)
    converted = convert(adapter, layout)
    (after,) = again(converted, "sd15").modules.values()
    assert "scalar" not in after.factors
    assert {entry.fate for entry in converted.ledger if entry.key.endswith("scalar")} == {"folded"}
    base = torch.randn(12, 12)
    torch.testing.assert_close(after.delta(base), scalar * before.delta(base), rtol=1e-5, atol=1e-7)
