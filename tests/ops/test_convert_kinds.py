"""LyCORIS' kinds between layouts, cut and put together, refused by name, and turned into LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.errors import LayoutError, UnsupportedKindError
from loratools.model import Adapter
from loratools.ops.convert import Converted, convert, convert_file, verify
from loratools.ops.files import load
from tests.ops import lycoris_files as files

# Layouts that have names for all that LyCORIS stores.
HOLDERS = ("kohya", "lycoris", "onetrainer", "musubi", "comfy")
# One weight that every layout has whole, one that those with diffusers' names have in three parts, one convolution.
PLAIN = ("flux", "lora_unet_double_blocks_0_img_mlp_0", (24, 8))
FUSED = ("flux", "lora_unet_double_blocks_0_img_attn_qkv", (24, 8))
KERNEL = ("sd15", "lora_unet_down_blocks_0_resnets_1_conv1", (12, 8, 3, 3))
NATIVE = {
    PLAIN: "double_blocks.0.img_mlp.0",
    FUSED: "double_blocks.0.img_attn.qkv",
    KERNEL: "input_blocks.2.0.in_layers.2",
}
DIFFUSERS = {
    PLAIN: ["transformer_blocks.0.ff.net.0.proj"],
    FUSED: [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    KERNEL: ["down_blocks.0.resnets.1.conv1"],
}
CASES = [(PLAIN, kind) for kind in files.LINEAR] + [(KERNEL, kind) for kind in files.CONV]
# How each kind of a fused weight can be cut into thirds.
CUT = ("lora", "loha", "lokr-thirds", "oft", "glora", "ia3", "ia3-in", "full", "dora")
UNCUT = {
    "lokr": "2 rows of its lokr_w1 cannot be parted into 3",
    "lokr-whole": "2 rows of its lokr_w1 cannot be parted into 3",
    "oft-constrained": "constraint on its rotation is one of all rows",
    "boft": "cannot be taken apart",
    "dora-in": "magnitude per input is that of all rows",
    "sparse": "cannot be taken apart",
}

Place = tuple[str, str, tuple[int, ...]]
Content = dict[str, tuple[str, tuple[int, ...], bytes]]


def content(converted: Converted) -> Content:
    """A document's tensors, bit by bit."""
    return {ref.name: (ref.dtype, ref.shape, bytes(ref.raw())) for ref in converted.document.tensors}


def again(converted: Converted, arch: str) -> Adapter:
    """What a reader sees of a document."""
    document = converted.document
    tensors = {ref.name: ref for ref in document.tensors}
    return formats.read(tensors, metadata=document.metadata, config=document.config or {}, arch=arch)


def given(tmp_path: Path, place: Place, kind: str, name: str = "in") -> tuple[Adapter, files.Tensors]:
    """An adapter of one module, and its tensors by suffix."""
    arch, stem, shape = place
    own = files.tensors(kind, shape)
    file = files.write(tmp_path / f"{name}.safetensors", {stem: own})
    return load(file, arch=arch, embedded=True), own


def weight(place: Place) -> np.ndarray:
    """The base weight of a place, in float32's values."""
    rng = np.random.default_rng(7)
    return rng.standard_normal(place[2]).astype(np.float32).astype(np.float64)


def base_file(tmp_path: Path, place: Place) -> Path:
    """A checkpoint of one file with its own names."""
    whole = torch.from_numpy(weight(place)).float()
    held = {f"model.diffusion_model.{NATIVE[place]}.weight": whole}
    make.write_safetensors(tmp_path / "base.safetensors", held, None)
    return tmp_path / "base.safetensors"


def base_folder(tmp_path: Path, place: Place) -> Path:
    """A diffusers folder, which has apart what the checkpoint has fused."""
    names = DIFFUSERS[place]
    parts = torch.from_numpy(weight(place)).float().chunk(len(names))
    held = {f"{name}.weight": part.contiguous() for name, part in zip(names, parts, strict=True)}
    network = "unet" if place[0] == "sd15" else "transformer"
    make.write_safetensors(tmp_path / "model" / network / "diffusion_pytorch_model.safetensors", held, None)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def holders(place: Place) -> tuple[str, ...]:
    # musubi trains transformers alone.
    return tuple(layout for layout in HOLDERS if place is not KERNEL or layout != "musubi")


@pytest.mark.parametrize(("place", "kind"), CASES)
def test_every_kind_is_carried_between_layouts_bit_for_bit(place: Place, kind: str, tmp_path: Path) -> None:
    """By whatever way a file comes to a layout, it is the same file, and the way back gives the first."""
    adapter, own = given(tmp_path, place, kind)
    straight = {layout: convert(adapter, layout) for layout in holders(place)}
    for one, other in itertools.permutations(straight, 2):
        there = convert(again(straight[one], place[0]), other)
        assert content(there) == content(straight[other]), f"{kind}: {one} to {other}"
    stored = {f"{place[1]}.{suffix}": make.f64(tensor).tobytes() for suffix, tensor in own.items()}
    assert {ref.name: make.f64(ref.load()).tobytes() for ref in straight["kohya"].document.tensors} == stored


@pytest.mark.parametrize("layout", ["diffusers", "peft", "attn-procs", "loralib", "ai-toolkit"])
@pytest.mark.parametrize("kind", ["loha", "oft", "boft", "glora", "ia3", "full", "sparse"])
def test_a_layout_without_names_for_a_kind_refuses_it_by_its_keys(
    layout: str, kind: str, tmp_path: Path
) -> None:
    adapter, own = given(tmp_path, PLAIN, kind)
    tag = {"boft": "oft", "sparse": "sparse"}.get(kind, kind)
    with pytest.raises(LayoutError, match=r"has no names for|cannot hold") as caught:
        convert(adapter, layout)
    assert set(caught.value.keys) == {f"{PLAIN[1]}.{suffix}" for suffix in own}
    # There is nothing else in the file: dropping it would not help, and is not offered.
    assert "--drop" not in str(caught.value)
    with pytest.raises(LayoutError, match="nothing is left"):
        convert(adapter, layout, drop=[tag])


@pytest.mark.parametrize("layout", ["diffusers", "peft", "ai-toolkit"])
def test_a_magnitude_per_input_is_refused_and_dropped_by_name(layout: str, tmp_path: Path) -> None:
    adapter, _ = given(tmp_path, PLAIN, "dora-in")
    with pytest.raises(LayoutError, match=r"magnitude per input.*--drop magnitude") as caught:
        convert(adapter, layout)
    assert caught.value.keys == (f"{PLAIN[1]}.dora_scale",)
    left = convert(adapter, layout, drop=["magnitude"])
    assert [module.magnitude for module in left.adapter.modules.values()] == [None]
    assert [entry.fate for entry in left.ledger if entry.key.endswith("dora_scale")] == ["dropped"]


@pytest.mark.parametrize("layout", ["diffusers", "peft", "ai-toolkit", "comfy", "onetrainer"])
def test_a_magnitude_per_output_keeps_its_axis(layout: str, tmp_path: Path) -> None:
    adapter, own = given(tmp_path, PLAIN, "dora")
    there = again(convert(adapter, layout), "flux")
    (module,) = there.modules.values()
    assert module.magnitude_axis == "out"
    assert module.magnitude is not None
    assert np.array_equal(module.magnitude.load().numpy().ravel(), own["dora_scale"].numpy().ravel())


@pytest.mark.parametrize("layout", ["lycoris", "onetrainer"])
@pytest.mark.parametrize("kind", CUT)
def test_a_fused_module_is_cut_into_the_parts_that_its_rows_are(
    kind: str, layout: str, tmp_path: Path
) -> None:
    adapter, own = given(tmp_path, FUSED, kind)
    base = weight(FUSED)
    cut = again(convert(adapter, layout), "flux")
    assert sorted(str(target.rows) for target in cut.modules) == ["0:1/3", "1:2/3", "2:3/3"]
    expected = files.dense(kind, own, FUSED[2], base)
    for target, module in cut.modules.items():
        assert target.rows is not None
        (start, stop), height = target.rows.spans[0], FUSED[2][0] // 3
        rows = slice(start * height, stop * height)
        found = module.delta(torch.from_numpy(base[rows])).double().numpy()
        assert np.allclose(found, expected[rows], atol=1e-6)
    if "diff_b" in own:
        parts = sorted(cut.modules.values(), key=lambda module: str(module.target.rows))
        assert torch.equal(torch.cat([module.factors["diff_b"].load() for module in parts]), own["diff_b"])


@pytest.mark.parametrize("layout", ["lycoris", "onetrainer"])
@pytest.mark.parametrize("kind", CUT)
def test_what_was_cut_is_put_together_again_bit_for_bit(kind: str, layout: str, tmp_path: Path) -> None:
    adapter, _ = given(tmp_path, FUSED, kind)
    back = convert(again(convert(adapter, layout), "flux"), "kohya")
    assert content(back) == content(convert(adapter, "kohya"))


@pytest.mark.parametrize("kind", CUT)
def test_the_proof_knows_a_cut_module_again(kind: str, tmp_path: Path) -> None:
    """Kinds whose factors do not say the weight's shape (OFT, IA3) are compared too."""
    adapter, _ = given(tmp_path, FUSED, kind)
    cut = convert(adapter, "lycoris")
    assert verify(adapter, cut, again(cut, "flux")).error <= 3e-7
    with pytest.raises(Exception, match="would change"):
        verify(adapter, cut, _spoilt(again(cut, "flux")))


def _spoilt(adapter: Adapter) -> Adapter:
    """The adapter with one number of one floating factor changed."""
    modules = dict(adapter.modules)
    target, module = next(iter(modules.items()))
    role, ref = next((role, ref) for role, ref in module.factors.items() if ref.numel > 1)
    values = ref.load().clone()
    values.view(-1)[1] += 0.5
    changed = lt.tensors.from_torch(ref.name, values)
    modules[target] = module._replace(factors={**module.factors, role: changed})
    return Adapter(modules, arch=adapter.arch, layout=adapter.layout)


@pytest.mark.parametrize(("kind", "reason"), UNCUT.items())
def test_what_cannot_be_cut_is_refused_with_the_reason_and_the_way_out(
    kind: str, reason: str, tmp_path: Path
) -> None:
    adapter, own = given(tmp_path, FUSED, kind)
    with pytest.raises(LayoutError, match=reason) as caught:
        convert(adapter, "onetrainer")
    assert set(caught.value.keys) == {f"{FUSED[1]}.{suffix}" for suffix in own}
    assert "--as lora" in str(caught.value)
    whole = convert(adapter, "onetrainer", as_kind="lora", base=base_file(tmp_path, FUSED))
    found = make.whole(again(whole, "flux"))["denoiser/" + NATIVE[FUSED]]
    expected = files.dense(kind, own, FUSED[2], weight(FUSED))
    assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("held", [base_file, base_folder], ids=["file", "folder"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("place", "kind"), [*CASES, *((FUSED, kind) for kind in files.LINEAR)], ids=lambda each: str(each)[-30:]
)
def test_any_kind_becomes_lora_with_the_same_delta(
    place: Place, kind: str, layout: str, held: object, tmp_path: Path
) -> None:
    assert callable(held)
    adapter, own = given(tmp_path, place, kind)
    base = held(tmp_path, place)
    expected = files.dense(kind, own, place[2], weight(place))
    size = np.linalg.norm(expected)
    drop = ["bias"] if kind == "full" and layout == "diffusers" else []
    exact = convert(adapter, layout, as_kind="lora", base=base, drop=drop)
    assert {module.kind for module in exact.adapter.modules.values()} == {"lora"}
    found = _only(again(exact, place[0]))
    assert found.shape == place[2]
    assert np.linalg.norm(found - expected) < 2e-6 * size
    assert {entry.fate for entry in exact.ledger} <= {
        "converted",
        "moved",
        "split",
        "folded",
        "metadata",
        "dropped",
    }
    cut = convert(adapter, layout, as_kind="lora", base=base, rank=1, drop=drop)
    error = np.linalg.norm(_only(again(cut, place[0])) - expected) / size
    (said,) = cut.conversions
    sigma = np.linalg.svd(expected.reshape(place[2][0], -1), compute_uv=False)
    best = np.linalg.norm(sigma[1:]) / np.linalg.norm(sigma)
    assert abs(error - said.error) < 1e-5
    assert abs(error - best) < 1e-5
    assert said.rank == 1


def _only(adapter: Adapter) -> np.ndarray:
    """ΔW of the only weight, fused."""
    (found,) = make.whole(adapter).values()
    return found


@pytest.mark.parametrize(("kind", "rank"), files.EXACT.items())
def test_factors_are_multiplied_out_at_their_full_rank(kind: str, rank: int, tmp_path: Path) -> None:
    adapter, _ = given(tmp_path, PLAIN, kind)
    found = convert(adapter, "kohya", as_kind="lora", base=base_file(tmp_path, PLAIN))
    (conversion,) = found.conversions
    assert (conversion.rank, conversion.exact, conversion.kind) == (rank, True, kind.split("-")[0])
    assert conversion.error < 1e-6


@pytest.mark.parametrize("kind", files.NEEDY)
def test_kinds_that_need_the_base_say_so_together(kind: str, tmp_path: Path) -> None:
    modules = {f"lora_unet_double_blocks_{n}_img_mlp_0": files.tensors(kind, PLAIN[2], n) for n in range(3)}
    modules["lora_unet_double_blocks_3_img_mlp_0"] = files.tensors("loha", PLAIN[2])
    file = files.write(tmp_path / "in.safetensors", modules)
    with pytest.raises(UnsupportedKindError, match=r"3 of 4 modules.*--base") as caught:
        convert(lt.load(file, arch="flux"), "kohya", as_kind="lora")
    assert caught.value.keys == tuple(f"double_blocks.{n}.img_mlp.0" for n in range(3))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_base_tells_the_kernel_that_a_flattened_factor_does_not(kind: str, tmp_path: Path) -> None:
    adapter, _ = given(tmp_path, KERNEL, kind)
    blind = convert(adapter, "kohya", as_kind="lora")
    told = convert(adapter, "kohya", as_kind="lora", base=base_file(tmp_path, KERNEL))
    (flat,), (whole,) = blind.adapter.modules.values(), told.adapter.modules.values()
    assert flat.factors["down"].shape == (4, 8 * 9)
    assert whole.factors["down"].shape == (4, 8, 3, 3)
    assert whole.factors["up"].shape == (12, 4, 1, 1)


def test_a_base_without_a_component_serves_kinds_that_do_not_need_it(tmp_path: Path) -> None:
    encoder = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    modules = {PLAIN[1]: files.tensors("oft", PLAIN[2]), encoder: files.tensors("loha", (24, 8))}
    file = files.write(tmp_path / "in.safetensors", modules)
    found = convert(
        lt.load(file, arch="flux"), "kohya", as_kind="lora", base=base_file(tmp_path, PLAIN), rank=2
    )
    assert {each.kind for each in found.conversions} == {"oft", "loha"}
    needy = files.write(tmp_path / "needy.safetensors", {**modules, encoder: files.tensors("ia3", (24, 8))})
    with pytest.raises(UnsupportedKindError, match=r"1 of 2 modules.*no such weight"):
        convert(lt.load(needy, arch="flux"), "kohya", as_kind="lora", base=base_file(tmp_path, PLAIN))


def test_two_encoders_with_one_path_are_accounted_for_apart(tmp_path: Path) -> None:
    path = "text_model_encoder_layers_0_mlp_fc1"
    modules = {f"lora_te{n}_{path}": files.tensors("loha", (24, 8), n) for n in (1, 2)}
    modules["lora_unet_joint_blocks_0_x_block_attn_proj"] = files.tensors("lora", (8, 8))
    file = files.write(tmp_path / "in.safetensors", modules)
    report = convert_file(file, tmp_path / "out.safetensors", arch="sd3", as_kind="lora")
    for entry in report.ledger:
        assert entry.into
        assert {key.partition(".")[0] for key in entry.into} == {entry.key.partition(".")[0]}


# A file as LyCORIS' presets make them: a kind for each sort of layer, norms and biases.
MIXED: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "double_blocks.0.img_attn.qkv": ("lora", (24, 8)),
    "double_blocks.0.txt_attn.qkv": ("lokr-thirds", (24, 8)),
    "double_blocks.1.img_attn.qkv": ("loha", (24, 8)),
    "double_blocks.1.img_mlp.0": ("full", (32, 8)),
    "double_blocks.0.txt_mlp.0": ("ia3", (32, 8)),
    "double_blocks.1.txt_attn.proj": ("dora", (8, 8)),
}
NORM = "double_blocks.0.img_attn.norm.query_norm"
BIAS = "double_blocks.1.img_attn.proj"


def mixed(tmp_path: Path) -> tuple[Adapter, dict[str, files.Tensors]]:
    """The file, and its modules' tensors by path."""
    own = {path: files.tensors(kind, shape, n) for n, (path, (kind, shape)) in enumerate(MIXED.items())}
    own[NORM] = {"w_norm": torch.full((8,), 0.25), "b_norm": torch.full((8,), 0.5)}
    own[BIAS] = {"diff_b": torch.full((8,), 0.125)}
    stems = {"lora_unet_" + path.replace(".", "_"): tensors for path, tensors in own.items()}
    return lt.load(files.write(tmp_path / "mixed.safetensors", stems), arch="flux"), own


def test_a_mixed_file_is_carried_whole(tmp_path: Path) -> None:
    adapter, _ = mixed(tmp_path)
    assert adapter.kinds == {"lora": 2, "lokr": 1, "loha": 1, "full": 3, "ia3": 1}
    comfy = convert(adapter, "comfy")
    assert verify(adapter, comfy, again(comfy, "flux")).weights == len(MIXED) + 2
    assert content(convert(again(comfy, "flux"), "kohya")) == content(convert(adapter, "kohya"))


def test_a_mixed_file_becomes_lora_but_for_norms_and_biases(tmp_path: Path) -> None:
    adapter, own = mixed(tmp_path)
    rng = np.random.default_rng(3)
    held = {path: rng.standard_normal(shape).astype(np.float32) for path, (_, shape) in MIXED.items()}
    tensors = {f"{path}.weight": torch.from_numpy(array) for path, array in held.items()}
    tensors |= {f"{NORM}.scale": torch.ones(8), f"{BIAS}.weight": torch.ones(8, 8)}
    make.write_safetensors(tmp_path / "base.safetensors", tensors, None)
    found = convert(adapter, "kohya", as_kind="lora", base=tmp_path / "base.safetensors")
    after = again(found, "flux")
    by_path = {target.path: module for target, module in after.modules.items()}
    for path, (kind, shape) in MIXED.items():
        expected = files.dense(kind, own[path], shape, held[path].astype(np.float64))
        error = np.linalg.norm(by_path[path].delta().double().numpy() - expected)
        assert error < 2e-6 * np.linalg.norm(expected), path
    assert torch.equal(by_path[NORM].factors["w_norm"].load(), own[NORM]["w_norm"])
    assert torch.equal(by_path[BIAS].factors["diff_b"].load(), own[BIAS]["diff_b"])
    bias = by_path["double_blocks.1.img_mlp.0"].factors["diff_b"].load()
    assert torch.equal(bias, own["double_blocks.1.img_mlp.0"]["diff_b"])
    assert {each.kind for each in found.conversions} == {"lokr", "loha", "full", "ia3", "dora"}
    # diffusers has no place for norms and biases, which is said together and dropped together.
    with pytest.raises(LayoutError, match=r"--drop norm --drop bias|--drop bias --drop norm"):
        convert(adapter, "diffusers", as_kind="lora", base=tmp_path / "base.safetensors")
    left = convert(
        adapter, "diffusers", as_kind="lora", base=tmp_path / "base.safetensors", drop=["norm", "bias"]
    )
    dropped = {entry.key for entry in left.ledger if entry.fate == "dropped"}
    assert {key.rpartition(".")[2] for key in dropped} == {"w_norm", "b_norm", "diff_b"}


def test_a_conversion_that_truncates_is_proved_against_what_it_made(tmp_path: Path) -> None:
    adapter, _ = given(tmp_path, PLAIN, "loha")
    report = convert_file(
        adapter.path, tmp_path / "out.safetensors", to="kohya", arch="flux", as_kind="lora", rank=1
    )
    assert report.weights == 1
    assert report.error is not None
    assert report.error <= 1e-6
    assert report.conversions[0].error > 0.05


def test_a_dora_of_gpt_2_becomes_lora_with_a_base_that_stores_it_the_other_way_round(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", make.GPT2, dora=True, config={"fan_in_fan_out": True})
    rng = np.random.default_rng(5)
    held = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in make.GPT2}
    tensors = {f"{path}.weight": torch.from_numpy(array.T.copy()) for path, array in held.items()}
    make.write_safetensors(tmp_path / "base.safetensors", tensors, None)
    report = convert_file(
        made.path, tmp_path / "out", to="peft", as_kind="lora", base=tmp_path / "base.safetensors"
    )
    assert {each.kind for each in report.conversions} == {"dora"}
    for target, module in lt.load(tmp_path / "out").modules.items():
        base = held[target.path].astype(np.float64)
        changed = base + made.deltas[make.key_of(target.component, target.path)]
        magnitude = make.f64(made.tensors[f"base_model.model.{target.path}.lora_magnitude_vector"])
        wanted = magnitude[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True) - base
        error = np.linalg.norm(module.delta().double().numpy() - wanted)
        assert error < 2e-6 * np.linalg.norm(wanted)
