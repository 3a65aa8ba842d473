"""Two checkpoints that are stored differently, or that do not belong together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import (
    ArchitectureError,
    LayoutError,
    NameResolutionError,
    NonFiniteError,
    OptionError,
    OutputExistsError,
    ShapeError,
    UnsupportedKindError,
)
from loratools.io.base import Weight
from loratools.model import Rows, Target
from loratools.ops._extract_pairs import MATRIX, Stored, by_weight, counterpart
from loratools.ops.extract import extract
from tests.ops import checkpoints as make

ROOT = Path(__file__).resolve().parents[2]
DIFFUSERS = {
    "input_blocks.1.1.": "down_blocks.0.attentions.0.",
    "input_blocks.4.1.": "down_blocks.1.attentions.0.",
    "middle_block.1.": "mid_block.attentions.0.",
}


def fixture_script():
    spec = importlib.util.spec_from_file_location("sd15", ROOT / "fixtures" / "make_sd15_checkpoints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> tuple[Path, Path, dict, dict]:
    """Two checkpoints of Stable Diffusion 1.5 with a few of the fixture's tensors, and their values."""
    script, folder = fixture_script(), tmp_path_factory.mktemp("sd15")
    chosen = (*(f"model.diffusion_model.{name}" for name in (*DIFFUSERS, "input_blocks.0.0", "out.")),)
    chosen = (
        *chosen,
        "cond_stage_model.transformer.text_model.encoder.layers.0.",
        "first_stage_model.quant",
        "betas",
    )
    whole = script.base(8, torch.float32)
    base = {key: value for key, value in whole.items() if key.startswith(chosen)}
    tuned = dict(base)
    script.tune(tuned)
    tuned["first_stage_model.quant_conv.weight"] = tuned["first_stage_model.quant_conv.weight"] + 1
    return (
        make.save(base, folder / "base.ckpt"),
        make.save(tuned, folder / "tuned.safetensors"),
        base,
        tuned,
    )


def test_the_fixture_has_the_names_of_a_real_checkpoint(shared: Path) -> None:
    names = fixture_script().names(320)
    unet = json.loads((shared / "names" / "sd15.json").read_text())["components"]["unet"]
    prefix = "model.diffusion_model."
    expected = {f"{prefix}{row['native']}.weight": tuple(row["shape"]) for row in unet["modules"]}
    expected |= {prefix + row["native"]: tuple(row["shape"]) for row in unet["others"]}
    found = {name: shape for name, shape in names.items() if name.startswith(prefix)}
    assert expected.items() <= found.items()
    assert {name for name in found if name not in expected} <= {
        name.replace(".weight", ".bias") for name in expected
    }


def test_checkpoints_of_both_containers(sd15, tmp_path: Path) -> None:
    base, tuned, before, after = sd15
    _, report = extract(base, tuned, tmp_path / "out.safetensors", rank=8, dtype="float32")
    written = lt.load(tmp_path / "out.safetensors")
    assert written.arch == "sd15"
    assert written.layout.name == "kohya"
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(written.modules) == len(changed) - 1 == len(report.modules)
    (vae,) = report.left_out
    assert vae.key == "first_stage_model.quant_conv.weight"
    assert "outside" in vae.why
    assert vae.norm == pytest.approx(8.0)
    for target, module in written.modules.items():
        prefix = {"denoiser": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}
        key = f"{prefix[target.component]}{target.path}.weight"
        delta = after[key] - before[key]
        assert float((module.delta().reshape(delta.shape) - delta).norm() / delta.norm()) < 0.02, key


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "lycoris", "onetrainer"])
def test_every_layout_holds_the_same_weights(layout: str, sd15, tmp_path: Path) -> None:
    base, tuned, *_ = sd15
    extract(base, tuned, tmp_path / "kohya.safetensors", rank=4, components=["denoiser"])
    extract(base, tuned, tmp_path / "other.safetensors", rank=4, components=["denoiser"], to=layout)
    one, other = (lt.load(tmp_path / f"{name}.safetensors", arch="sd15") for name in ("kohya", "other"))
    assert one.modules.keys() == other.modules.keys()
    for target, module in one.modules.items():
        assert torch.equal(module.delta(), other.modules[target].delta())


def test_a_tuned_network_in_a_folder_of_diffusers(sd15, tmp_path: Path) -> None:
    base, tuned, _, after = sd15
    prefix = "model.diffusion_model."
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    renamed = {}
    for key, value in after.items():
        for native, diffusers in DIFFUSERS.items():
            if key.startswith(prefix + native):
                renamed[diffusers + key.removeprefix(prefix + native)] = value
    save_file(renamed, tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    chosen = {"components": ["denoiser"], "include": ["attn", "proj", "ff"], "rank": 4}
    single, _ = extract(base, tuned, **chosen)
    found, _ = extract(base, tmp_path / "pipeline", **chosen)
    assert single is not None
    assert found is not None
    assert found.modules.keys() == single.modules.keys()
    for target, module in found.modules.items():
        assert torch.equal(module.delta(), single.modules[target].delta())


def test_shards_are_one_model(tmp_path: Path) -> None:
    base = make.llama()
    tuned = make.tuned(base)
    whole = make.save(base, tmp_path / "base.safetensors"), make.save(tuned, tmp_path / "tuned.safetensors")
    folders = make.shard(base, tmp_path / "two", 2), make.shard(tuned, tmp_path / "three", 3)
    extract(*whole, tmp_path / "a", rank=2)
    extract(*folders, tmp_path / "b", rank=2)
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("a", "b"))
    first, second = lt.load(one), lt.load(other)
    for target, module in first.modules.items():
        assert torch.equal(module.delta(), second.modules[target].delta())


def weight(name: str, rows: int) -> Weight:
    return Weight(name, (rows, 4), "F32", "x", 0)


def stored(name: str, rows: Rows | None, height: int) -> Stored:
    return Stored(Target("denoiser", "qkv", rows), "weight", MATRIX, weight(name, height))


def test_a_fused_weight_and_its_parts_are_the_same_rows() -> None:
    thirds = [stored(name, Rows(((at, at + 1),), 3), 5) for at, name in enumerate("qkv")]
    fused = stored("qkv", None, 15)
    pieces = counterpart(fused, by_weight(thirds))
    assert isinstance(pieces, tuple)
    assert [(piece.weight.key, piece.spans) for piece in pieces] == [
        ("q", ((0, 5, 0),)),
        ("k", ((5, 10, 0),)),
        ("v", ((10, 15, 0),)),
    ]
    (middle,) = counterpart(thirds[1], by_weight([fused])) or ()
    assert (middle.weight.key, middle.spans) == ("qkv", ((0, 5, 5),))  # type: ignore[union-attr]
    assert counterpart(fused, by_weight(thirds[:2])) is None
    halves = stored("swapped", Rows(((1, 2), (0, 1)), 2), 10)
    (turned,) = counterpart(halves, by_weight([stored("straight", None, 10)])) or ()
    assert turned.spans == ((0, 5, 5), (5, 10, 0))  # type: ignore[union-attr]


def test_fused_against_split_gives_the_same_adapter(tmp_path: Path) -> None:
    """Flux's qkv as the original names it, against diffusers' three projections."""
    stem, twin = "double_blocks.0.img_attn", "transformer_blocks.0.attn"
    parts = {name: make.random((16, 16), at) for at, name in enumerate(("to_q", "to_k", "to_v"))}
    rest = {"out": make.random((16, 16), 7)}
    change = {name: make.low_rank((16, 16), 2, 40 + at) for at, name in enumerate(parts)}

    def fused(values: dict[str, torch.Tensor]) -> make.State:
        return {
            f"{stem}.qkv.weight": torch.cat([*values.values()]),
            f"{stem}.proj.weight": rest["out"],
        }

    def split(values: dict[str, torch.Tensor]) -> make.State:
        named = {f"{twin}.{name}.weight": value for name, value in values.items()}
        return {**named, f"{twin}.to_out.0.weight": rest["out"]}

    tuned = {name: value + change[name] for name, value in parts.items()}
    paths = {
        name: make.save(state, tmp_path / f"{name}.safetensors")
        for name, state in {
            "fused": fused(parts),
            "split": split(parts),
            "fused-tuned": fused(tuned),
            "split-tuned": split(tuned),
        }.items()
    }
    whole, _ = extract(paths["fused"], paths["split-tuned"], rank=6, arch="flux")
    assert whole is not None
    (module,) = whole.modules.values()
    assert torch.allclose(module.delta(), torch.cat([*change.values()]), atol=1e-5)
    apart, report = extract(paths["split"], paths["fused-tuned"], rank=2, arch="flux", to="diffusers")
    assert apart is not None
    assert len(report.modules) == 3
    for target, module in apart.modules.items():
        assert target.rows is not None
        name = list(parts)[target.rows.spans[0][0]]
        assert torch.allclose(module.delta(), change[name], atol=1e-5)


def test_float8_is_compared_by_its_values(tmp_path: Path) -> None:
    values = make.random((16, 16), 3)
    scale = torch.tensor(0.25)
    packed = (values / scale).to(torch.float8_e4m3fn)
    base = {"layers.0.mlp.up_proj.weight": packed, "layers.0.mlp.up_proj.scale_weight": scale}
    dense = packed.float() * scale
    tuned = {"layers.0.mlp.up_proj.weight": dense + make.low_rank((16, 16), 2, 9)}
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    found, report = extract(*paths, rank=2, dtype="float32")
    assert found is not None
    (module,) = found.modules.values()
    assert torch.allclose(module.delta(), make.low_rank((16, 16), 2, 9), atol=1e-5)
    assert extract(*paths, rank=2)[1].dtype == "BF16"
    assert report.left_out == ()


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    base = make.llama()
    tuned = make.tuned(base, only="lm_head")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([tuned[name], torch.full((2, 24), 3.0)])
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    found, report = extract(*paths, rank=3)
    assert found is not None
    (head,) = found.modules.values()
    assert torch.allclose(head.delta(), tuned["lm_head.weight"][:50] - base["lm_head.weight"], atol=1e-5)
    assert {each.key for each in report.left_out} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert [each.norm for each in report.left_out] == [pytest.approx(3.0 * 48**0.5)] * 2
    assert all("2 new rows" in each.why for each in report.left_out)
    tuned |= make.tuned({key: value for key, value in base.items() if "mlp" in key})
    paths = paths[0], make.save(tuned, tmp_path / "c.safetensors")
    _, report = extract(*paths, tmp_path / "out", rank=3, embeddings=True)
    assert not report.left_out
    assert {module.kind for module in report.modules if "mlp" not in module.target} == {"full"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(written["base_model.model.lm_head.weight"], tuned["lm_head.weight"])


def test_an_inpainting_model_is_named(sd15, tmp_path: Path) -> None:
    base, _, _, after = sd15
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = {**after, key: torch.cat([after[key], torch.ones(8, 5, 3, 3)], 1)}
    path = make.save(wide, tmp_path / "inpainting.safetensors")
    with pytest.raises(ShapeError, match="inpainting") as caught:
        extract(base, path, rank=1)
    assert caught.value.keys == (key,)
    _, report = extract(base, path, rank=1, exclude=["input_blocks.0.0"])
    assert report.modules


def test_checkpoints_that_do_not_belong_together(sd15, tmp_path: Path) -> None:
    base, _, _, after = sd15
    llama = make.save(make.llama(), tmp_path / "llama.safetensors")
    with pytest.raises(ArchitectureError, match="sd15"):
        extract(base, llama, rank=1)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    without = make.save(
        {name: value for name, value in after.items() if name != key}, tmp_path / "a.safetensors"
    )
    with pytest.raises(NameResolutionError) as caught:
        extract(base, without, rank=1)
    assert caught.value.keys == (key,)
    assert caught.value.path == str(without)
    assert extract(base, without, rank=1, exclude=[r"middle_block\.1\.proj_in"])[1].modules
    bare = {name: value for name, value in after.items() if "cond_stage" not in name}
    with pytest.raises(NameResolutionError, match=r"no text_encoder at all.*--components denoiser"):
        extract(base, make.save(bare, tmp_path / "b.safetensors"), rank=1)
    other = {**after, key: after[key][:-1]}
    with pytest.raises(ShapeError, match="instead of"):
        extract(base, make.save(other, tmp_path / "c.safetensors"), rank=1)
    with pytest.raises(OptionError, match="no weight that is extracted differs"):
        extract(base, base, rank=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_are_named(value: float, side: int, tmp_path: Path) -> None:
    states = [make.llama(), make.tuned(make.llama())]
    key = "model.layers.0.mlp.up_proj.weight"
    states[side][key][3, 4] = value
    paths = [make.save(state, tmp_path / f"{at}.safetensors") for at, state in enumerate(states)]
    with pytest.raises(NonFiniteError) as caught:
        extract(*paths, tmp_path / "out", rank=1)
    assert caught.value.keys == (key,)
    assert caught.value.path == str(paths[side])
    assert not (tmp_path / "out").exists()
    assert len([*tmp_path.iterdir()]) == 2


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    base = make.llama()
    packed = {key: value for key, value in base.items() if "up_proj" not in key}
    stem = "model.layers.0.mlp.up_proj.weight"
    packed[stem] = torch.zeros(768, 1, dtype=torch.uint8)
    packed[f"{stem}.absmax"] = torch.zeros(12)
    packed[f"{stem}.quant_map"] = torch.zeros(16)
    packed[f"{stem}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
    paths = make.save(packed, tmp_path / "a.safetensors"), make.save(base, tmp_path / "b.safetensors")
    with pytest.raises(UnsupportedKindError, match="quantised") as caught:
        extract(*paths, rank=1)
    assert stem in caught.value.keys


def test_an_output_is_neither_replaced_nor_a_checkpoint(tmp_path: Path) -> None:
    base = make.llama()
    paths = (
        make.save(base, tmp_path / "a.safetensors"),
        make.save(make.tuned(base), tmp_path / "b.safetensors"),
    )
    before = paths[0].read_bytes()
    with pytest.raises(OutputExistsError):
        extract(*paths, paths[0], rank=1)
    with pytest.raises(OptionError, match="over a checkpoint"):
        extract(*paths, paths[0], rank=1, overwrite=True)
    with pytest.raises(LayoutError, match="no place"):
        extract(*paths, tmp_path / "out.safetensors", rank=1, to="kohya")
    assert paths[0].read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 2
