"""Every tensor of an input is accounted for: what became of it, and where it went."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import factories as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import LayoutError
from loratools.model import Adapter
from loratools.ops.convert import Converted, convert, convert_file
from loratools.ops.results import LedgerEntry

FATES = {"moved", "split", "fused", "folded", "converted", "metadata", "implied", "zero", "dropped"}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PARTS = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UNET_TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def entries(converted: Converted) -> dict[str, LedgerEntry]:
    return {entry.key: entry for entry in converted.ledger}


def lawful(adapter: Adapter, converted: Converted) -> None:
    """The laws that hold for every conversion."""
    assert [entry.key for entry in converted.ledger] == list(adapter.order)
    written = {ref.name for ref in converted.document.tensors}
    reached = {key for entry in converted.ledger for key in entry.into}
    assert reached <= written
    assert all(key.endswith("alpha") for key in written - reached)
    for entry in converted.ledger:
        assert entry.fate in FATES
        if entry.fate in ("moved", "split", "fused", "converted"):
            assert entry.into, entry
        if entry.fate in ("dropped", "metadata"):
            assert not entry.into, entry


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Adapter:
    return lt.load(make.kohya(tmp_path_factory.mktemp("flux") / "a.safetensors", "flux", alpha=3.0).path)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Adapter:
    return lt.load(make.diffusers(tmp_path_factory.mktemp("split") / "a.safetensors", "flux").path)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Adapter:
    return lt.load(make.kohya(tmp_path_factory.mktemp("sd15") / "a.safetensors", "sd15", alpha=3.0).path)


def test_a_renamed_tensor_is_moved_to_its_new_key(sd15):
    converted = convert(sd15, "diffusers")
    lawful(sd15, converted)
    found = entries(converted)
    assert found[f"{TO_Q}.lora_up.weight"][:3] == (
        f"{TO_Q}.lora_up.weight",
        "moved",
        (f"{UNET_TO_Q}.lora_B.weight",),
    )
    assert found[f"{TO_Q}.lora_down.weight"].into == (f"{UNET_TO_Q}.lora_A.weight",)
    assert found[f"{TO_Q}.alpha"][1:3] == ("metadata", ())
    header = json.loads(converted.document.metadata["lora_adapter_metadata"])
    assert header["unet.lora_alpha"] == 3


def test_a_fused_tensor_is_split_into_its_parts(flux):
    converted = convert(flux, "diffusers")
    lawful(flux, converted)
    up, down = (entries(converted)[f"{QKV}.lora_{end}.weight"] for end in ("up", "down"))
    assert up.fate == down.fate == "split"
    assert up.into == tuple(f"{part}.lora_B.weight" for part in PARTS)
    assert down.into == tuple(f"{part}.lora_A.weight" for part in PARTS)


def test_an_alpha_is_split_where_the_layout_has_one_for_each_part(flux):
    converted = convert(flux, "onetrainer")
    lawful(flux, converted)
    alpha = entries(converted)[f"{QKV}.alpha"]
    assert alpha.fate == "split"
    assert len(alpha.into) == 3
    assert all(key.endswith(".alpha") for key in alpha.into)


def test_parts_are_fused_into_one_key(split):
    converted = convert(split, "kohya")
    lawful(split, converted)
    found = entries(converted)
    for part in PARTS:
        assert found[f"{part}.lora_B.weight"][1:3] == ("fused", (f"{QKV}.lora_up.weight",))
        assert found[f"{part}.lora_A.weight"][1:3] == ("fused", (f"{QKV}.lora_down.weight",))


def test_an_alpha_without_a_place_is_folded(sd15):
    converted = convert(sd15, "ai-toolkit")
    lawful(sd15, converted)
    found = entries(converted)
    assert found[f"{TO_Q}.alpha"][1:] == ("folded", (), "scale 0.75 in the factors")
    assert found[f"{TO_Q}.lora_up.weight"].fate == "folded"
    assert found[f"{TO_Q}.lora_up.weight"].into == (f"{UNET_TO_Q}.lora_B.weight",)


def test_a_converted_kind_says_what_it_was(tmp_path):
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", kind="lokr").path)
    converted = convert(adapter, "diffusers", as_kind="lora")
    lawful(adapter, converted)
    into = tuple(f"{UNET_TO_Q}.lora_{end}.weight" for end in "AB")
    for end in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"):
        entry = entries(converted)[f"{TO_Q}.{end}"]
        assert (entry.fate, entry.detail) == ("converted", "lokr to lora")
        assert sorted(entry.into) == sorted(into)


def test_a_magnitude_moves_with_its_factors(tmp_path):
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", dora="out").path)
    converted = convert(adapter, "diffusers")
    lawful(adapter, converted)
    assert entries(converted)[f"{TO_Q}.dora_scale"][1:3] == ("moved", (f"{UNET_TO_Q}.lora_magnitude_vector",))


def test_extras_move_or_are_dropped_by_name(tmp_path):
    token = {"bundle_emb.style.string_to_param.*": torch.ones(2, 8)}
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", extra=token).path)
    key = next(iter(token))
    moved = convert(adapter, "comfy")
    lawful(adapter, moved)
    assert entries(moved)[key][1:3] == ("moved", (key,))
    with pytest.raises(LayoutError) as caught:
        convert(adapter, "diffusers")
    assert caught.value.keys == (key,)
    dropped = convert(adapter, "diffusers", drop=["extras"])
    lawful(adapter, dropped)
    assert [tuple(entry) for entry in dropped.ledger if entry.fate == "dropped"] == [
        (key, "dropped", (), "extras")
    ]


def test_a_dropped_component_lists_all_its_tensors(flux):
    converted = convert(flux, "musubi", drop=["text_encoder"])
    lawful(flux, converted)
    dropped = {entry.key for entry in converted.ledger if entry.fate == "dropped"}
    assert dropped == {key for key in flux.order if key.startswith("lora_te1_")}
    assert {entry.detail for entry in converted.ledger if entry.fate == "dropped"} == {"text_encoder"}


def test_a_dropped_part_of_a_module_is_listed_while_the_module_stays(tmp_path):
    adapter = lt.load(make.peft(tmp_path / "a", lora_bias=True).path)
    converted = convert(adapter, "loralib", drop=["bias"])
    lawful(adapter, converted)
    dropped = {entry.key for entry in converted.ledger if entry.fate == "dropped"}
    assert dropped == {key for key in adapter.order if key.endswith("lora_B.bias")}
    assert len(converted.adapter.modules) == len(adapter.modules)


def test_folding_on_request_is_said_of_alpha_and_factors(sd15):
    converted = convert(sd15, "kohya", fold=True)
    lawful(sd15, converted)
    found = entries(converted)
    assert found[f"{TO_Q}.alpha"].fate == "folded"
    assert found[f"{TO_Q}.alpha"].into == (f"{TO_Q}.alpha",)
    assert found[f"{TO_Q}.lora_up.weight"].fate == "folded"
    # Half of a power of two below one goes nowhere else: the right factor is as it was.
    assert found[f"{TO_Q}.lora_down.weight"].fate == "moved"


def test_an_exact_fold_changes_factors_too(tmp_path):
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", rank=4, alpha=2.0).path)
    converted = convert(adapter, "ai-toolkit")
    assert entries(converted)[f"{TO_Q}.lora_up.weight"].fate == "folded"


def test_the_report_counts_fates_and_lists_what_was_dropped(tmp_path, flux):
    report = convert_file(flux.path, tmp_path / "out.safetensors", to="musubi", drop=["text_encoder"])
    assert report.fates == Counter(entry.fate for entry in report.ledger)
    assert sum(report.fates.values()) == len(flux.order)
    assert set(report.dropped) == {key for key in flux.order if key.startswith("lora_te1_")}


def refused(error: LayoutError, adapter: Adapter) -> None:
    assert error.keys
    assert set(error.keys) <= set(adapter.order)
    assert any(way in str(error) for way in ("--drop", "--to", "--as lora"))


LAYOUTS = ["kohya", "diffusers", "comfy", "onetrainer", "ai-toolkit", "lycoris"]


@st.composite
def made(draw):
    """Arguments of a file in Kohya's layout, and a layout to bring it to."""
    arch = draw(st.sampled_from(["sd15", "sdxl", "flux"]))
    kind = draw(st.sampled_from(["lora", "lora", "loha", "lokr", "full"]))
    return {
        "arch": arch,
        "kind": kind,
        "seed": draw(st.integers(0, 99)),
        "rank": draw(st.integers(1, 4)),
        "alpha": draw(st.sampled_from([None, 1.0, 2.0, 3.0, -1.5])),
        "dora": draw(st.sampled_from(["", "out", "in"])) if kind == "lora" else "",
        "ranks": {"qkv": draw(st.integers(1, 4))},
    }, draw(st.sampled_from(LAYOUTS))


@settings(max_examples=40, deadline=None)
@given(made())
def test_the_laws_hold_for_any_file(tmp_path_factory, drawn: tuple[dict, str]):
    given_arguments, layout = drawn
    path: Path = tmp_path_factory.mktemp("made") / "a.safetensors"
    adapter = lt.load(make.kohya(path, **given_arguments).path)
    try:
        converted = convert(adapter, layout)
    except LayoutError as error:
        refused(error, adapter)
        return
    lawful(adapter, converted)
    assert not [entry for entry in converted.ledger if entry.fate == "dropped"]
