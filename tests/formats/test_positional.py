"""Files that number their modules: the numbers become names where shapes confirm an order, and names numbers again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.archs import _positions
from loratools.errors import ArchitectureError, LayoutError
from loratools.io.pickle_writer import write_pickle_list
from loratools.model import Layout

CORPUS = Path(__file__).resolve().parents[2] / ".." / "shared" / "corpus"
real = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not beside the repository")

BASE = 4
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ATTN1 = [f"attn1.{name}" for name in PROJECTIONS]
ATTN2 = [f"attn2.{name}" for name in PROJECTIONS]
GATE = ["ff.net.0.proj"]
LEAVES = {"gate last": ATTN1 + ATTN2 + GATE, "gate between": ATTN1 + GATE + ATTN2, "attention": ATTN1 + ATTN2}
# The UNet's blocks as its constructor registers them, and how wide they are.
BLOCKS = [
    *((f"down_blocks.{level}.attentions.{place}", 2**level) for level in (0, 1, 2) for place in (0, 1)),
    *(
        (f"up_blocks.{level}.attentions.{place}", 2 ** (3 - level))
        for level in (1, 2, 3)
        for place in (0, 1, 2)
    ),
    ("mid_block.attentions.0", 4),
]
CLIP = [
    f"text_model.encoder.layers.{layer}.self_attn.{name}_proj"
    for layer in range(12)
    for name in ("k", "v", "q", "out")
]


def unet(order: str = "gate last", prompt: int = 768) -> list[tuple[str, tuple[int, int]]]:
    """diffusers' names and (out, in) of every numbered weight."""
    found = []
    for block, level in BLOCKS:
        width = BASE * level
        for leaf in LEAVES[order]:
            into = prompt if leaf in ("attn2.to_k", "attn2.to_v") else width
            found.append(
                (f"{block}.transformer_blocks.0.{leaf}", (8 * width if leaf in GATE else width, into))
            )
    return found


def pair(shape: tuple[int, int], seed: int, rank: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    made, _ = make.lora_factors(shape, rank, torch.float32, make.np.random.default_rng(seed))
    return made["up"], made["down"]


def numbered(shapes: Iterable[tuple[int, int]], prefix: str = "unet:") -> dict[str, torch.Tensor]:
    tensors = {}
    for number, shape in enumerate(shapes):
        tensors[f"{prefix}{number}:up"], tensors[f"{prefix}{number}:down"] = pair(shape, number)
    return tensors


def named(weights: Iterable[tuple[str, tuple[int, int]]], prefix: str = "unet.") -> dict[str, torch.Tensor]:
    """The same weights with the same values under diffusers' names."""
    tensors = {}
    for number, (name, shape) in enumerate(weights):
        up, down = pair(shape, number)
        tensors |= {f"{prefix}{name}.lora_B.weight": up, f"{prefix}{name}.lora_A.weight": down}
    return tensors


def loaded(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> lt.Adapter:
    make.write_safetensors(path, tensors, metadata)
    return lt.load(path)


def paths(adapter: lt.Adapter) -> list[str]:
    return [str(target) for target in adapter.modules]


@pytest.mark.parametrize("order", LEAVES)
@pytest.mark.parametrize(("prompt", "arch"), [(768, "sd15"), (1024, "sd2")])
def test_numbers_are_read_as_the_weights_whose_shapes_they_have(
    order: str, prompt: int, arch: str, tmp_path: Path
) -> None:
    weights = unet(order, prompt)
    adapter = loaded(tmp_path / "a.safetensors", numbered(shape for _, shape in weights))
    reference = loaded(tmp_path / "b.safetensors", named(weights))
    assert (adapter.arch, adapter.layout.name, adapter.notes) == (arch, "cloneofsimo", ())
    assert list(adapter.modules) == list(reference.modules)
    make.assert_close(make.deltas_of(adapter), make.deltas_of(reference))


@pytest.mark.parametrize("change", ["one fewer", "another shape", "a gap"])
def test_numbers_that_fit_no_order_stay_numbers(change: str, tmp_path: Path) -> None:
    shapes = [shape for _, shape in unet()]
    if change == "one fewer":
        shapes.pop()
    if change == "another shape":
        shapes[5] = (BASE, 640)
    tensors = numbered(shapes)
    if change == "a gap":
        del tensors["unet:7:up"], tensors["unet:7:down"]
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    assert adapter.arch == "unknown"
    assert {(target.component, target.path) for target in adapter.modules} == {
        ("denoiser", key.split(":")[1]) for key in tensors
    }
    lt.save(adapter, tmp_path / "b.safetensors")
    assert make.read_safetensors(tmp_path / "b.safetensors") == make.read_safetensors(
        tmp_path / "a.safetensors"
    )


def test_a_half_that_fits_no_order_keeps_its_numbers_and_a_note_says_so(tmp_path: Path) -> None:
    tensors = numbered(shape for _, shape in unet()) | numbered([(6, 6)] * 3, "text_encoder:")
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    assert adapter.arch == "sd15"
    assert [t.path for t in adapter.modules if t.component == "text_encoder"] == ["0", "1", "2"]
    assert adapter.notes == ("3 modules have numbers that fit no known order",)


def test_another_architecture_than_the_shapes_say_is_refused(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "a.safetensors", numbered(shape for _, shape in unet()), None)
    assert lt.load(tmp_path / "a.safetensors", arch="sd15").arch == "sd15"
    with pytest.raises(ArchitectureError, match="Flux"):
        lt.load(tmp_path / "a.safetensors", arch="flux")


def test_a_bare_list_is_read_as_the_component_whose_shapes_it_has(tmp_path: Path) -> None:
    weights = unet()
    torch.save(list(numbered(shape for _, shape in weights).values()), tmp_path / "unet.pt")
    adapter = lt.load(tmp_path / "unet.pt")
    assert list(adapter.modules) == list(loaded(tmp_path / "b.safetensors", named(weights)).modules)
    assert adapter.layout == Layout("cloneofsimo", "pt-list", "pickle")
    torch.save(list(numbered([(768, 768)] * 48).values()), tmp_path / "text.pt")
    assert paths(lt.load(tmp_path / "text.pt")) == CLIP
    torch.save(list(numbered([(6, 6)] * 3).values()), tmp_path / "other.pt")
    assert paths(lt.load(tmp_path / "other.pt")) == ["0", "1", "2"]


@pytest.mark.parametrize("order", ["gate last", "attention"])
def test_names_are_written_as_numbers_and_read_again(order: str, tmp_path: Path) -> None:
    weights = unet(order)
    text = [(name, (768, 768)) for name in CLIP]
    tensors = named(weights) | named(text, "text_encoder.")
    backwards = dict(reversed(tensors.items()))
    lt.save(loaded(tmp_path / "a.safetensors", backwards), tmp_path / "b.safetensors", layout="cloneofsimo")
    written, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    expected = numbered(shape for _, shape in weights) | numbered(
        [shape for _, shape in text], "text_encoder:"
    )
    assert {key: value[2] for key, value in written.items()} == {
        key: tensor.numpy().tobytes() for key, tensor in expected.items()
    }
    classes = ["CrossAttention", "Attention", "GEGLU"][: 3 if order == "gate last" else 2]
    assert json.loads(metadata["unet"]) == classes
    assert json.loads(metadata["text_encoder"]) == ["CLIPAttention"]
    assert {key for key in metadata if key.endswith(":rank")} == {
        f"{key.rpartition(':')[0]}:rank" for key in expected
    }
    again = lt.load(tmp_path / "b.safetensors")
    make.assert_close(make.deltas_of(again), make.deltas_of(lt.load(tmp_path / "a.safetensors")))


def test_the_header_of_another_rank_is_not_passed_on(tmp_path: Path) -> None:
    """A computed adapter in this layout states its own ranks, whatever its input's header said."""
    stale = {
        "unet": '["Linear"]',
        "unet:0:rank": "64",
        "text_encoder": '["CLIPAttention"]',
        "<s1>": "<embed>",
    }
    adapter = loaded(tmp_path / "a.safetensors", numbered(shape for _, shape in unet()), stale)
    merged = lt.merge([adapter, adapter], weights=[0.5, 0.5], rank=1)
    lt.save(merged, tmp_path / "b.safetensors")
    _, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    assert metadata["unet:0:rank"] == "1"
    assert "GEGLU" in json.loads(metadata["unet"])
    assert not {"text_encoder", "<s1>"} & metadata.keys()


def test_every_module_that_is_missing_from_the_order_is_named(tmp_path: Path) -> None:
    weights = unet()
    left_out = [weights[3], weights[-3]]
    adapter = loaded(tmp_path / "a.safetensors", named(each for each in weights if each not in left_out))
    with pytest.raises(LayoutError, match="cannot leave out 2 modules") as caught:
        lt.save(adapter, tmp_path / "b.safetensors", layout="cloneofsimo")
    assert caught.value.keys == (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        "middle_block.1.transformer_blocks.0.attn2.to_v",
    )
    assert not (tmp_path / "b.safetensors").exists()


def test_every_module_outside_the_order_is_named(tmp_path: Path) -> None:
    inside = unet()
    outside = [("down_blocks.0.attentions.0.proj_in", (BASE, BASE)), ("conv_out", (4, BASE))]
    adapter = loaded(tmp_path / "a.safetensors", named([*inside, *outside]))
    with pytest.raises(LayoutError, match="its order does not number") as caught:
        formats.document(adapter, Layout("cloneofsimo"), formats.get("cloneofsimo"))
    assert caught.value.keys == ("input_blocks.1.1.proj_in", "out.2")
    with pytest.raises(LayoutError, match="its order does not number") as caught:
        lt.save(adapter, tmp_path / "b.safetensors", layout="cloneofsimo")
    assert set(caught.value.keys) == named(outside).keys()
    assert not (tmp_path / "b.safetensors").exists()
    sdxl = make.kohya(tmp_path / "c.safetensors", "sdxl", alpha=4.0, only=["attn"])
    with pytest.raises(LayoutError, match="its order does not number"):
        lt.save(lt.load(sdxl.path), tmp_path / "d.safetensors", layout="cloneofsimo")


def test_tokens_travel_and_are_marked(tmp_path: Path) -> None:
    token = torch.arange(6.0)
    extra = {"bundle_emb.<s1>.string_to_param.*": token.reshape(1, 6)}
    adapter = loaded(tmp_path / "a.safetensors", named(unet()) | extra)
    lt.save(adapter, tmp_path / "b.safetensors", layout="cloneofsimo")
    written, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    assert written["<s1>"] == ("F32", (6,), token.numpy().tobytes())
    assert metadata["<s1>"] == "<embed>"
    assert set(lt.load(tmp_path / "b.safetensors").extras) == {"<s1>"}
    several = loaded(
        tmp_path / "c.safetensors", named(unet()) | {"bundle_emb.two.string_to_param.*": torch.ones(2, 6)}
    )
    with pytest.raises(LayoutError, match=r"bundle_emb\.two"):
        lt.save(several, tmp_path / "d.safetensors", layout="cloneofsimo")


def listed(adapter: lt.Adapter) -> formats.Document:
    return formats.document(adapter, Layout("cloneofsimo", "pt-list", "pickle"), formats.get("cloneofsimo"))


def test_a_list_is_written_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    weights = unet()
    adapter = loaded(tmp_path / "a.safetensors", dict(reversed(named(weights).items())))
    document = listed(adapter)
    assert [ref.shape for ref in document.tensors[:2]] == [(BASE, 1), (1, BASE)]
    write_pickle_list(tmp_path / "b.pt", document.tensors)
    expected = list(numbered(shape for _, shape in weights).values())
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    make.assert_close(make.deltas_of(lt.load(tmp_path / "b.pt")), make.deltas_of(adapter))


def test_a_list_holds_one_component_and_no_names(tmp_path: Path) -> None:
    text = named([(name, (768, 768)) for name in CLIP], "text_encoder.")
    both = loaded(tmp_path / "a.safetensors", named(unet()) | text)
    with pytest.raises(LayoutError, match="two components") as caught:
        listed(both)
    assert caught.value.path == str(tmp_path / "a.safetensors")
    assert caught.value.keys == tuple(CLIP)
    assert ".safetensors" in caught.value.todo
    with pytest.raises(LayoutError, match="--drop text_encoder") as caught:
        lt.save(both, tmp_path / "b.pt", layout="cloneofsimo")
    assert set(caught.value.keys) == text.keys()
    lt.save(both, tmp_path / "b.pt", layout="cloneofsimo", drop=["text_encoder"])
    assert set(lt.load(tmp_path / "b.pt").components()) == {"denoiser"}
    token = {"bundle_emb.<s1>.string_to_param.*": torch.ones(1, 6)}
    with pytest.raises(LayoutError, match="<s1>"):
        listed(loaded(tmp_path / "b.safetensors", named(unet()) | token))


@real
@pytest.mark.parametrize("folder", ["cloneofsimo-safetensors", "cloneofsimo-pt-list"])
def test_all_shapes_of_a_real_file_fit_the_order(folder: str, tmp_path: Path) -> None:
    (path,) = [path for path in (CORPUS / folder).rglob("*") if path.is_file()]
    adapter = lt.load(path)
    assert (adapter.arch, adapter.notes) == ("sd15", ())
    counts = {name: len(modules) for name, modules in adapter.components().items()}
    assert counts == {"cloneofsimo-safetensors": {"text_encoder": 48, "denoiser": 144}}.get(
        folder, {"text_encoder": 48}
    )
    assert not [target for target in adapter.modules if target.path.isdigit()]
    lt.save(adapter, tmp_path / "a.safetensors", layout="diffusers", drop=["extras"])
    # Text encoders alone look alike in several architectures.
    named = lt.load(tmp_path / "a.safetensors", arch="sd15")
    lt.save(named, tmp_path / "b.safetensors", layout="cloneofsimo")
    again = lt.load(tmp_path / "b.safetensors")
    assert set(again.modules) == set(adapter.modules)
    for target, module in adapter.modules.items():
        for role, ref in module.factors.items():
            assert again.modules[target].factors[role].raw() == ref.raw()


@pytest.mark.peers
def test_the_order_is_that_of_the_libraries_modules() -> None:
    """cloneofsimo's search: linear layers below modules of certain classes, as torch walks over them."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "attention_head_dim": 4}
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config, cross_attention_dim=768)
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=16, num_hidden_layers=12, intermediate_size=8, num_attention_heads=2
            )
        )
    usual, _, attention = _positions.unet_orders("sd15")
    assert walk(model, {"Attention", "GEGLU"}, "unet.") == list(usual.names)
    assert walk(model, {"Attention"}, "unet.") == list(attention.names)
    order = _positions.text_encoder_order("sd15")
    assert order is not None
    found = [name.replace(".text_model.", ".") for name in walk(text, {"CLIPAttention"}, "text_encoder.")]
    assert found == [name.replace(".text_model.", ".") for name in order.names]


@pytest.mark.peers
@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_processors_are_numbered_as_diffusers_lists_them(arch: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = {"block_out_channels": (8, 16, 32, 32), "cross_attention_dim": 768}
    if arch == "sdxl":
        config = {
            "block_out_channels": (8, 16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
        }
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config, norm_num_groups=4, attention_head_dim=4)
    prompt = config["cross_attention_dim"]
    order = _positions.find_processors(prompt, 1)
    assert order is not None
    assert [f"{name}.processor" for name in order.names] == [f"unet.{name}" for name in model.attn_processors]
    assert _positions.find_processors(prompt, len(order.names) + 1) is None


def walk(model: torch.nn.Module, classes: set[str], prefix: str) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    found = [
        names[id(layer)]
        for module in model.modules()
        if type(module).__name__ in classes
        for layer in module.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    return [prefix + name for name in found]


# Segment Anything


def sam(blocks: int, width: int, rank: int = 1) -> dict[str, torch.Tensor]:
    tensors = {}
    for number in range(2 * blocks):
        tensors[f"w_b_{number:03d}"], tensors[f"w_a_{number:03d}"] = pair((width, width), number, rank)
    return tensors


@pytest.mark.parametrize(("blocks", "width"), [(12, 768), (24, 1024), (32, 1280)])
def test_sams_numbers_are_the_q_and_v_rows_of_each_block(blocks: int, width: int, tmp_path: Path) -> None:
    adapter = loaded(tmp_path / "a.safetensors", sam(blocks, width))
    assert paths(adapter) == [
        f"image_encoder.blocks.{block}.attn.qkv[{rows}]"
        for block in range(blocks)
        for rows in ("0:1/3", "2:3/3")
    ]
    assert {(target.component, adapter.arch) for target in adapter.modules} == {("vision_model", "vision")}
    assert any("Segment Anything" in note for note in adapter.notes)


@pytest.mark.parametrize(("blocks", "width"), [(11, 768), (12, 1024), (12, 16)])
def test_numbers_of_other_transformers_stay_numbers(blocks: int, width: int, tmp_path: Path) -> None:
    adapter = loaded(tmp_path / "a.safetensors", sam(blocks, width))
    assert {target.path for target in adapter.modules} == {f"w_{n:03d}" for n in range(2 * blocks)}
    assert not adapter.notes


def test_a_classifier_beside_the_numbers_means_another_model(tmp_path: Path) -> None:
    adapter = loaded(tmp_path / "a.safetensors", sam(12, 768) | {"fc_000": torch.ones(2, 2)})
    assert next(iter(adapter.modules)).path.startswith("w_")


def test_sams_modules_are_written_as_numbers_again(tmp_path: Path) -> None:
    tensors = sam(12, 768)
    adapter = loaded(tmp_path / "a.safetensors", dict(reversed(tensors.items())))
    lt.save(replace(adapter, order=()), tmp_path / "b.safetensors")
    written, _ = make.read_safetensors(tmp_path / "b.safetensors")
    assert written == {
        key: ("F32", tuple(tensor.shape), tensor.numpy().tobytes()) for key, tensor in tensors.items()
    }


def test_sam_holds_all_blocks_and_nothing_else(tmp_path: Path) -> None:
    form = formats.get("sam")
    whole = loaded(tmp_path / "a.safetensors", sam(12, 768))
    few = lt.Adapter(dict(list(whole.modules.items())[:-3]), arch="vision")
    with pytest.raises(LayoutError, match="cannot leave out 3 of 24") as caught:
        formats.document(few, Layout("sam", "w_a_b"), form)
    assert "image_encoder.blocks.11.attn.qkv[2:3/3]" in caught.value.keys
    other = make.kohya(tmp_path / "b.safetensors", alpha=4.0, only=["attn1", "attn2"])
    with pytest.raises(LayoutError, match="other than q and v") as caught:
        lt.save(lt.load(other.path), tmp_path / "c.safetensors", layout="sam")
    assert set(caught.value.keys) == other.tensors.keys()


@pytest.mark.parametrize("scale", [0.5, -8.0, 0.75])
@pytest.mark.parametrize("layout", ["cloneofsimo", "sam"])
def test_a_scale_is_folded_into_what_is_numbered(layout: str, scale: float, tmp_path: Path) -> None:
    tensors = sam(12, 768) if layout == "sam" else numbered(shape for _, shape in unet())
    whole = loaded(tmp_path / "a.safetensors", tensors)
    scaled = {target: module._replace(scale=scale) for target, module in whole.modules.items()}
    adapter = replace(whole, modules=scaled, order=(), layout=Layout("diffusers", "peft-keys"))
    with pytest.raises(LayoutError, match="scale other than 1") as caught:
        formats.document(adapter, Layout(layout), formats.get(layout))
    assert len(caught.value.keys) == len(whole.modules)
    lt.save(adapter, tmp_path / "b.safetensors", layout=layout)
    again = lt.load(tmp_path / "b.safetensors")
    assert set(again.modules) == set(whole.modules)
    assert {module.scale for module in again.modules.values()} == {1.0}
    for target, module in list(again.modules.items())[:5]:
        products = [
            make.f64(each["up"].load()) @ make.f64(each["down"].load())
            for each in (module.factors, whole.modules[target].factors)
        ]
        make.np.testing.assert_allclose(products[0], scale * products[1], rtol=1e-6 if scale == 0.75 else 0.0)
