"""Files that a conversion could get wrong in silence: mixed dtypes, zero parts, file orders, names of nobody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools.errors import ConversionError, LayoutError, LoraError, NonFiniteError, OptionError

WIDTH = 16
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PARTS = "lora_transformer_transformer_blocks_0_attn_to_"
DOTTED = "transformer.transformer_blocks.0.attn."


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (size * torch.randn(*shape, generator=generator)).to(dtype)


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    # As the safetensors package orders them, so that parts come as k, q, v.
    make.write_safetensors(path, dict(sorted(tensors.items())), metadata)
    return path


def to(source: Path, layout: str, **options: object) -> Path:
    output = source.with_name(f"{source.stem}-{layout}" + ("" if layout == "peft" else ".safetensors"))
    lt.convert(source, output, to=layout, **{"arch": "flux", "overwrite": True, **options})
    return output


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return make.read_safetensors(path)[0]


def block_diagonal(ranks: tuple[int, int, int]) -> torch.Tensor:
    up = torch.zeros(3 * WIDTH, sum(ranks))
    start = 0
    for part, rank in enumerate(ranks):
        up[part * WIDTH : (part + 1) * WIDTH, start : start + rank] = rand(WIDTH, rank, seed=part)
        start += rank
    return up


@pytest.mark.parametrize("layout", ["diffusers", "onetrainer", "lycoris"])
def test_a_fused_file_comes_back_bit_for_bit_through_files_on_disk(layout: str, tmp_path: Path) -> None:
    fused = {
        f"{QKV}.lora_up.weight": block_diagonal((2, 3, 1)),
        f"{QKV}.lora_down.weight": rand(6, WIDTH),
        f"{QKV}.alpha": torch.tensor(3.0),
    }
    source = write(tmp_path / "a.safetensors", fused)
    assert tensors(to(to(source, layout), "kohya")) == tensors(source)


@pytest.mark.parametrize(
    ("beside", "layout"), [("dora_scale", "diffusers"), ("diff_b", "onetrainer"), ("diff", "lycoris")]
)
def test_what_lies_beside_zero_factors_is_not_lost(beside: str, layout: str, tmp_path: Path) -> None:
    shape = {"dora_scale": (3 * WIDTH, 1), "diff_b": (3 * WIDTH,), "diff": (3 * WIDTH, WIDTH)}[beside]
    up = block_diagonal((2, 2, 2))
    up[WIDTH : 2 * WIDTH] = 0  # k was never trained
    file = {
        f"{QKV}.lora_up.weight": up,
        f"{QKV}.lora_down.weight": rand(6, WIDTH),
        f"{QKV}.alpha": torch.tensor(6.0),
        f"{QKV}.{beside}": rand(*shape).abs(),
    }
    source = write(tmp_path / "a.safetensors", file)
    parts = lt.load(to(source, layout), arch="flux").modules
    assert len(parts) == 3
    assert all(part.magnitude is not None or beside in part.factors for part in parts.values())


def test_magnitudes_of_several_dtypes_are_fused_by_value(tmp_path: Path) -> None:
    file: dict[str, torch.Tensor] = {}
    for name, dtype in (("q", torch.float32), ("k", torch.float16), ("v", torch.bfloat16)):
        file[f"{PARTS}{name}.lora_up.weight"] = rand(WIDTH, 2, seed=1)
        file[f"{PARTS}{name}.lora_down.weight"] = rand(2, WIDTH, seed=2)
        file[f"{PARTS}{name}.dora_scale"] = (rand(WIDTH, 1, seed=3).abs() + 0.5).to(dtype)
    adapter = lt.load(to(write(tmp_path / "a.safetensors", file), "kohya"), arch="flux")
    (module,) = adapter.modules.values()
    assert module.magnitude is not None
    expected = torch.cat([file[f"{PARTS}{name}.dora_scale"].float().flatten() for name in "qkv"])
    assert torch.equal(module.magnitude.load().flatten(), expected)


def test_parts_of_several_dtypes_and_scales_are_multiplied_in_the_widest(tmp_path: Path) -> None:
    file: dict[str, torch.Tensor] = {}
    rows = (
        ("to_q", torch.float32, 1.5, 2),
        ("to_k", torch.float16, -2.0, 3),
        ("to_v", torch.bfloat16, 0.7, 1),
    )
    for name, dtype, alpha, rank in rows:
        file[f"{DOTTED}{name}.lora_A.weight"] = rand(rank, WIDTH, dtype=dtype)
        file[f"{DOTTED}{name}.lora_B.weight"] = rand(WIDTH, rank, dtype=dtype)
        file[f"{DOTTED}{name}.alpha"] = torch.tensor(alpha)
    (module,) = lt.load(to(write(tmp_path / "a.safetensors", file), "kohya"), arch="flux").modules.values()
    expected = torch.cat(
        [
            alpha
            / rank
            * file[f"{DOTTED}{name}.lora_B.weight"].double()
            @ file[f"{DOTTED}{name}.lora_A.weight"].double()
            for name, _, alpha, rank in rows
        ]
    )
    assert (module.delta().double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_goes_between_the_rules_of_peft_and_kohya_in_half_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    stem = f"{DOTTED}to_out.0"
    file = {
        f"{stem}.lora_A.weight": rand(4, WIDTH, dtype=dtype),
        f"{stem}.lora_B.weight": rand(WIDTH, 4, dtype=dtype),
        f"{stem}.lora_B.bias": rand(WIDTH, dtype=dtype),
        f"{stem}.alpha": torch.tensor(1.3),
    }
    written = to(write(tmp_path / "a.safetensors", file), "kohya")
    (module,) = lt.load(written, arch="flux").modules.values()
    expected = 1.3 / 4 * file[f"{stem}.lora_B.bias"].double()
    found = module.factors["diff_b"].load().double()
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_a_small_part_of_a_fused_weight_is_not_lost_beside_large_ones(tmp_path: Path) -> None:
    file: dict[str, torch.Tensor] = {}
    for name, size in (("to_q", 1.0), ("to_k", 1e-9), ("to_v", 1.0)):
        file[f"{DOTTED}{name}.lora_A.weight"] = rand(4, WIDTH)
        file[f"{DOTTED}{name}.lora_B.weight"] = rand(WIDTH, 4, size=size)
    source = write(tmp_path / "a.safetensors", file)
    with pytest.raises(ConversionError, match=r"img_attn\.qkv"):
        to(source, "kohya", dtype="float16")
    assert to(source, "kohya", dtype="bfloat16").exists()


@pytest.mark.parametrize("role", ["oft_diag", "rescale", "glora"])
def test_a_part_is_not_fused_where_zeros_would_change_the_others(role: str, tmp_path: Path) -> None:
    stem = f"{PARTS}q"
    blocks = {f"{stem}.oft_blocks": rand(WIDTH // 4, 4, 4), f"{stem}.alpha": torch.tensor(0.0)}
    file = {
        "oft_diag": {f"{stem}.oft_diag": torch.eye(4).repeat(WIDTH // 4, 1, 1)},
        "rescale": {**blocks, f"{stem}.rescale": torch.ones(WIDTH, 1)},
        "glora": {
            **{f"{stem}.{name}.weight": rand(WIDTH, 2) for name in ("a1", "b1")},
            **{f"{stem}.{name}.weight": rand(2, WIDTH) for name in ("a2", "b2")},
            f"{stem}.alpha": torch.tensor(2.0),
        },
    }[role]
    with pytest.raises(LoraError, match="no module"):
        to(write(tmp_path / "a.safetensors", file), "kohya")


@pytest.mark.parametrize("prefix", ["unet.motion.", "prior.tower.", "transformer_2.gate."])
def test_a_prefix_that_nobody_described_stays_in_its_own_layout(prefix: str, tmp_path: Path) -> None:
    file = {
        f"{prefix}blocks.0.a.lora_A.weight": rand(2, WIDTH),
        f"{prefix}blocks.0.a.lora_B.weight": rand(WIDTH, 2),
    }
    source = write(tmp_path / "a.safetensors", file)
    assert set(tensors(to(source, "diffusers", arch=None, dtype="float16"))) == set(file)


def test_one_thing_that_cannot_be_spelt_does_not_keep_all_the_others_as_they_are(tmp_path: Path) -> None:
    stem = "lycoris_transformer_blocks_0_attn_to_"
    file = {
        f"{stem}q.oft_diag": torch.eye(4).repeat(WIDTH // 4, 1, 1),
        f"{stem}out_0.lora_down.weight": rand(2, WIDTH),
        f"{stem}out_0.lora_up.weight": rand(WIDTH, 2),
    }
    with pytest.raises(LoraError, match="no module"):
        to(write(tmp_path / "a.safetensors", file), "kohya")


def test_a_base_is_never_written_over(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"tower.gate.weight": rand(WIDTH, WIDTH)})
    before = base.read_bytes()
    file = {
        "lora_unet_tower_gate.lora_down.weight": rand(2, WIDTH),
        "lora_unet_tower_gate.lora_up.weight": rand(WIDTH, 2),
    }
    source = write(tmp_path / "a.safetensors", file)
    with pytest.raises(OptionError, match="over the base"):
        lt.convert(source, base, to="peft", base=base, overwrite=True)
    with pytest.raises(OptionError, match="over the base"):
        lt.convert(source, tmp_path / "out.safetensors", to="diffusers", base=tmp_path, overwrite=True)
    assert base.read_bytes() == before


def test_a_name_without_numbers_has_lost_its_dots_too(tmp_path: Path) -> None:
    file = {
        "lora_unet_tower_gate.lora_down.weight": rand(2, WIDTH),
        "lora_unet_tower_gate.lora_up.weight": rand(WIDTH, 2),
    }
    source = write(tmp_path / "a.safetensors", file)
    with pytest.raises(LayoutError, match="--base"):
        lt.convert(source, tmp_path / "peft", to="peft")


def test_what_is_no_number_is_said_and_not_blamed_on_the_conversion(tmp_path: Path) -> None:
    file = {
        f"{QKV}.lora_up.weight": torch.full((3 * WIDTH, 2), float("nan")),
        f"{QKV}.lora_down.weight": rand(2, WIDTH),
        f"{QKV}.alpha": torch.tensor(1.0),
    }
    source = write(tmp_path / "a.safetensors", file)
    with pytest.raises(NonFiniteError) as refused:
        to(source, "ai-toolkit")
    assert refused.value.keys == (f"{QKV}.lora_up.weight",)


def test_the_layouts_that_can_hold_a_thing_are_named(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", kind="loha")
    with pytest.raises(LayoutError, match=r"comfy, kohya, lycoris and onetrainer can hold them") as refused:
        lt.convert(made.path, tmp_path / "x.safetensors", to="diffusers")
    assert "--as lora" in str(refused.value)
    assert "--drop" not in str(refused.value)  # nothing would be left


def test_dropping_what_is_not_in_the_way_is_said_to_do_nothing(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15")
    report = lt.convert(made.path, tmp_path / "x.safetensors", to="comfy", drop="text_encoder", check=False)
    assert not report.dropped
    assert any("nothing to drop" in note for note in report.notes)


def test_a_scale_in_the_header_alone_is_said(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", rank=4, alpha=2.0)
    report = lt.convert(made.path, tmp_path / "x.safetensors", to="diffusers")
    assert any("--fold" in note for note in report.notes)
    folded = lt.convert(made.path, tmp_path / "y.safetensors", to="diffusers", fold=True)
    assert not any("--fold" in note for note in folded.notes)


ATTN1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"


def attention_alone(path: Path) -> Path:
    """A file of weights that Stable Diffusion 1.x and 2.x have under one name and at one width."""
    factors = {"down": (2, 320), "up": (320, 2)}
    return write(
        path, {f"{ATTN1}{p}.lora_{f}.weight": rand(*shape) for p in "qkv" for f, shape in factors.items()}
    )


def test_a_file_of_either_of_two_architectures_is_converted_where_both_spell_it_alike(tmp_path: Path) -> None:
    source = attention_alone(tmp_path / "a.safetensors")
    assert lt.load(source).candidates == ("sd15", "sd2")
    report = lt.convert(source, tmp_path / "x.safetensors", to="diffusers")
    assert any("sd15 and sd2 alike" in note for note in report.notes)
    assert all(
        key.startswith("unet.down_blocks.0.attentions.0") for key in tensors(tmp_path / "x.safetensors")
    )


def test_the_base_tells_two_architectures_apart(tmp_path: Path) -> None:
    source = attention_alone(tmp_path / "a.safetensors")
    stem = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_"
    names = {f"{stem}{part}.weight": rand(320, 320) for part in "qkv"}
    base = write(tmp_path / "base.safetensors", names)
    report = lt.convert(source, tmp_path / "x.safetensors", to="comfy", base=base)
    assert report.modules == (3, 3)
    assert all(
        key.startswith("diffusion_model.input_blocks.1.1") for key in tensors(tmp_path / "x.safetensors")
    )
