"""XLabs, attention processors, loralib with its fused form, and the LoRA inside an IP-Adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools import formats, io
from loratools.errors import LayoutError, NotAnAdapterError, ShapeError
from loratools.formats._parse import split
from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.ops import files
from loratools.tensors import from_torch


def pair(shape: tuple[int, int], seed: int, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    made, _ = make.lora_factors(shape, rank, torch.float32, np.random.default_rng(seed))
    return made["up"], made["down"]


def loaded(path: Path, tensors: Mapping[str, torch.Tensor], arch: str | None = None) -> lt.Adapter:
    make.write_safetensors(path, tensors, None)
    return lt.load(path, arch=arch)


def directly(adapter: lt.Adapter, layout: str) -> formats.Document:
    """The adapter named anew by the layout alone, without conversion."""
    return formats.document(replace(adapter, order=()), Layout(layout), formats.get(layout))


def keys_of(adapter: lt.Adapter, targets: Iterable[Target]) -> set[str]:
    """The input's keys of some modules."""
    return {ref.name for target in targets for _, ref in adapter.modules[target].tensors()}


def contents(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {key: ("F32", tuple(tensor.shape), tensor.numpy().tobytes()) for key, tensor in tensors.items()}


# XLabs


WIDTH = 8
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": ("double_blocks.{}.img_attn.qkv", (3 * WIDTH, WIDTH)),
    "double_blocks.{}.processor.proj_lora1": ("double_blocks.{}.img_attn.proj", (WIDTH, WIDTH)),
    "double_blocks.{}.processor.qkv_lora2": ("double_blocks.{}.txt_attn.qkv", (3 * WIDTH, WIDTH)),
    "double_blocks.{}.processor.proj_lora2": ("double_blocks.{}.txt_attn.proj", (WIDTH, WIDTH)),
}


def xlabs(blocks: int = 2) -> dict[str, torch.Tensor]:
    tensors = {}
    for block in range(blocks):
        for seed, (name, (_, shape)) in enumerate(XLABS.items()):
            stem = name.format(block)
            tensors[f"{stem}.up.weight"], tensors[f"{stem}.down.weight"] = pair(shape, 10 * block + seed)
    return tensors


@pytest.mark.parametrize(
    ("key", "stem", "role"),
    [
        ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1", "down"),
        ("double_blocks.18.processor.proj_lora2.up.weight", "double_blocks.18.processor.proj_lora2", "up"),
        ("single_blocks.0.processor.qkv_lora.up.weight", "single_blocks.0.processor.qkv_lora", "up"),
        ("single_blocks.3.processor.proj_lora.down.weight", "single_blocks.3.processor.proj_lora", "down"),
    ],
)
def test_xlabs_keeps_its_processors_in_the_stem(key: str, stem: str, role: str) -> None:
    part = split(key)
    assert part is not None
    assert (part.stem, part.suffix.role, part.suffix.style) == (stem, role, "xlabs")


def test_diffusers_processors_are_no_xlabs() -> None:
    part = split("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight")
    assert part is not None
    assert part.suffix.style == "attn-procs"


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_is_read_as_fluxs_fused_attention(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + key: tensor for key, tensor in xlabs().items()}
    adapter = loaded(tmp_path / "a.safetensors", tensors, "flux")
    assert adapter.layout.name == "xlabs"
    assert {str(target) for target in adapter.modules} == {
        native.format(block) for native, _ in XLABS.values() for block in range(2)
    }
    assert {module.scale for module in adapter.modules.values()} == {1.0}
    stem = f"{prefix}double_blocks.1.processor.qkv_lora2"
    up, down = tensors[f"{stem}.up.weight"], tensors[f"{stem}.down.weight"]
    found = make.deltas_of(adapter)["denoiser/double_blocks.1.txt_attn.qkv"]
    np.testing.assert_allclose(found, make.f64(up) @ make.f64(down), rtol=1e-5, atol=1e-6)


def test_xlabs_is_written_under_its_names(tmp_path: Path) -> None:
    tensors = {
        f"lora_unet_{native.format(0).replace('.', '_')}.lora_{role}.weight": tensor
        for seed, (native, shape) in enumerate(XLABS.values())
        for role, tensor in zip(("up", "down"), pair(shape, seed), strict=True)
    }
    adapter = loaded(tmp_path / "a.safetensors", tensors, "flux")
    lt.save(adapter, tmp_path / "b.safetensors", layout="xlabs")
    written, _ = make.read_safetensors(tmp_path / "b.safetensors")
    assert written == contents(xlabs(1))


def test_xlabs_names_all_that_it_has_no_name_for(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "flux", alpha=4.0)
    adapter = lt.load(made.path, arch="flux")
    inside = ("attn.qkv", "img_attn.proj", "linear2")
    outside = [target for target in adapter.modules if not target.path.endswith(inside)]
    with pytest.raises(LayoutError, match="other than Flux's attention") as caught:
        directly(adapter, "xlabs")
    assert set(caught.value.keys) == {str(target) for target in outside}
    # The adapter of a whole linear1 changes its attention's rows too, and the rest has no place.
    with pytest.raises(LayoutError, match="other than Flux's attention") as caught:
        lt.save(adapter, tmp_path / "b.safetensors", layout="xlabs")
    assert set(caught.value.keys) == keys_of(adapter, outside)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.peers
def test_xlabs_means_what_diffusers_reads_in_it(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    adapter = loaded(tmp_path / "a.safetensors", xlabs(), "flux")
    converted = _convert_xlabs_flux_lora_to_diffusers(dict(xlabs()))
    reference = loaded(tmp_path / "b.safetensors", converted, "flux")
    make.assert_close(make.whole(adapter), make.whole(reference))


# What layouts without alpha cannot name, and what is folded into the factors on the way there


@pytest.mark.parametrize("layout", ["xlabs", "attn-procs", "cloneofsimo", "loralib", "sam"])
def test_a_scale_without_a_place_is_not_named_away(layout: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", alpha=2.0, rank=4, only=["attn1", "attn2"])
    with pytest.raises(LayoutError, match="scale other than 1") as caught:
        directly(lt.load(made.path), layout)
    assert "loratools convert" in str(caught.value)
    assert len(caught.value.keys) == len(made.deltas)


@pytest.mark.parametrize(
    ("layout", "arch", "only"),
    [
        ("attn-procs", "sd15", ["attn1", "attn2"]),
        ("loralib", "sd15", ["unet_down_blocks_0_attentions"]),
        ("xlabs", "flux", ["attn_qkv", "img_attn_proj"]),
    ],
)
@pytest.mark.parametrize("alpha", [2.0, -1.0, 0.0, 3.0])
def test_a_scale_without_a_place_is_folded(
    layout: str, arch: str, only: list[str], alpha: float, tmp_path: Path
) -> None:
    made = make.kohya(tmp_path / "a.safetensors", arch, alpha=alpha, rank=4, only=only)
    if arch == "sd15":
        # Such layouts have no convolutions.
        flat = {
            key: value for key, value in made.tensors.items() if "proj_in" not in key and "conv" not in key
        }
        make.write_safetensors(made.path, flat, None)
    adapter = lt.load(made.path, arch=arch)
    lt.save(adapter, tmp_path / "b.safetensors", layout=layout)
    written, _ = make.read_safetensors(tmp_path / "b.safetensors")
    assert not [key for key in written if key.endswith("alpha")]
    again = lt.load(tmp_path / "b.safetensors", arch=arch)
    assert {module.scale for module in again.modules.values()} == {1.0}
    # Powers of two round nothing.
    rtol = 1e-6 if alpha == 3.0 else 0.0
    for target, module in adapter.modules.items():
        up, down = (make.f64(module.factors[role].load()) for role in ("up", "down"))
        found = again.modules[target].factors
        product = make.f64(found["up"].load()) @ make.f64(found["down"].load())
        np.testing.assert_allclose(product, alpha / 4 * (up @ down), rtol=rtol, atol=1e-7 if rtol else 0.0)


@pytest.mark.parametrize(
    ("what", "keys", "changes"),
    [
        ("DoRA magnitudes", ("dora_scale",), {"dora": "out", "only": ["attn1"]}),
        (
            "kind loha",
            ("alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            {"kind": "loha", "only": ["attn1"]},
        ),
        ("convolutions", ("alpha", "lora_up.weight", "lora_down.weight"), {"only": ["in_layers_2"]}),
    ],
)
def test_what_is_more_than_a_product_is_refused(
    what: str, keys: tuple[str, ...], changes: dict[str, object], tmp_path: Path
) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", alpha=4.0, **changes)  # type: ignore[arg-type]
    adapter = lt.load(made.path, arch="sdxl")
    (stem,) = {key.partition(".")[0] for key in made.tensors}
    for layout in ("attn-procs", "loralib"):
        with pytest.raises(LayoutError, match=what):
            directly(adapter, layout)
        # The whole file is in the way: what can hold it is said, and not how to be left with nothing.
        with pytest.raises(LayoutError, match="can hold them") as caught:
            lt.save(adapter, tmp_path / "b.safetensors", layout=layout)
        assert set(caught.value.keys) == {f"{stem}.{key}" for key in keys}
    assert not (tmp_path / "b.safetensors").exists()


# diffusers' attention processors


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_attention_is_written_as_processors_and_read_as_diffusers(arch: str, tmp_path: Path) -> None:
    made = make.kohya(
        tmp_path / "a.safetensors", arch, alpha=4.0, rank=4, only=["attn1", "attn2", "self_attn"]
    )
    adapter = lt.load(made.path)
    native = [target for target in adapter.modules if target.rows is None]
    adapter = replace(adapter, modules={target: adapter.modules[target] for target in native}, order=())
    lt.save(adapter, tmp_path / "b.safetensors", layout="attn-procs")
    written, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    assert metadata["format"] == "pt"
    stems = {key.removesuffix(".up.weight").removesuffix(".down.weight") for key in written}
    first = "down_blocks.0.attentions.0" if arch == "sd15" else "down_blocks.1.attentions.0"
    assert f"unet.{first}.transformer_blocks.0.attn1.processor.to_q_lora" in stems
    assert "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora" in stems
    if arch == "sd15":
        assert f"unet.{first}.transformer_blocks.0.attn1.processor.to_out_lora" in stems
    again = lt.load(tmp_path / "b.safetensors")
    assert (again.layout.name, again.layout.variant, again.arch) == ("diffusers", "attn-procs", arch)
    make.assert_close(make.deltas_of(again), make.deltas_of(adapter))
    assert formats.get("attn-procs").reads_as == ("diffusers",)


def test_all_that_has_no_processor_is_named(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", alpha=4.0, only=["attn1", "attn2", "ff_net", "mlp"])
    adapter = lt.load(made.path)
    outside = (
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
        "text_model.encoder.layers.0.mlp.fc1",
    )
    with pytest.raises(LayoutError, match="other than the attention") as caught:
        directly(adapter, "attn-procs")
    assert caught.value.keys == outside
    with pytest.raises(LayoutError, match="other than the attention") as caught:
        lt.save(adapter, tmp_path / "b.safetensors", layout="attn-procs")
    assert set(caught.value.keys) == keys_of(adapter, [t for t in adapter.modules if t.path in outside])


@pytest.mark.peers
def test_diffusers_understands_the_processors(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.utils import convert_unet_state_dict_to_peft
    from safetensors.torch import load_file

    made = make.kohya(tmp_path / "a.safetensors", alpha=4.0, only=["attn1", "attn2"])
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="attn-procs")
    names = set(convert_unet_state_dict_to_peft(load_file(tmp_path / "b.safetensors")))
    expected = {
        f"{weight.diffusers}.lora_{letter}.weight"
        for weight in make.SD15
        if ".attn" in weight.diffusers
        for letter in "AB"
    }
    assert names == expected


# loralib


GPT2 = "transformer.h.0.attn.c_attn"


def merged(parts: int, *, height: int = 12, width: int = 12, rank: int = 2) -> dict[str, torch.Tensor]:
    """loralib's pair for several parts, each ``height`` rows of the weight."""
    pairs = [pair((height, width), seed, rank) for seed in range(parts)]
    return {
        f"{GPT2}.lora_A": torch.cat([down for _, down in pairs]),
        f"{GPT2}.lora_B": torch.cat([up for up, _ in pairs]),
    }


def by_convolution(tensors: Mapping[str, torch.Tensor], enabled: list[bool]) -> np.ndarray:
    """ΔW as the paper's code makes it: a grouped convolution, and zeros where a part is not enabled."""
    a, b = tensors[f"{GPT2}.lora_A"], tensors[f"{GPT2}.lora_B"]
    product = torch.nn.functional.conv1d(a[None], b[:, :, None], groups=sum(enabled))[0]
    size = product.shape[0] // sum(enabled)
    rows = iter(product.split(size))
    blank = torch.zeros(size, a.shape[1])
    return make.f64(torch.cat([next(rows) if on else blank for on in enabled]))


@pytest.mark.parametrize("enabled", [[True, True, True], [True, False, True]])
def test_a_fused_pair_is_read_as_its_parts(enabled: list[bool], tmp_path: Path) -> None:
    tensors = merged(sum(enabled))
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    places = [place for place, on in enumerate(enabled) if on]
    assert [target.rows for target in adapter.modules] == [Rows(((p, p + 1),), of=3) for p in places]
    assert {target.path for target in adapter.modules} == {GPT2}
    assert adapter.layout == Layout("loralib", "merged")
    assert {module.rank for module in adapter.modules.values()} == {2}
    (found,) = make.whole(adapter).values()
    np.testing.assert_allclose(found, by_convolution(tensors, enabled), rtol=1e-5, atol=1e-6)
    assumed = [note for note in adapter.notes if "q and v are assumed" in note]
    assert bool(assumed) == (not all(enabled))


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_a_fused_pair_is_written_back_byte_for_byte(parts: int, container: str, tmp_path: Path) -> None:
    tensors = merged(parts) | {"transformer.h.1.attn.c_proj.lora_A": torch.ones(2, 12)}
    tensors |= {
        "transformer.h.1.attn.c_proj.lora_B": torch.ones(12, 2),
        "transformer.h.0.ln_1.bias": torch.ones(3),
    }
    path = tmp_path / f"a.{container}"
    if container == "pt":
        torch.save(tensors, path)
    else:
        make.write_safetensors(path, dict(sorted(tensors.items())), {"made": "by hand"})
    adapter = lt.load(path)
    assert set(adapter.extras) == {"transformer.h.0.ln_1.bias"}
    lt.save(adapter, tmp_path / "b.safetensors")
    written, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    assert written == contents(tensors)
    if container == "safetensors":
        assert list(written) == sorted(tensors)
        assert metadata == {"made": "by hand"}
    assert list(lt.load(tmp_path / "b.safetensors").modules) == list(adapter.modules)


def test_parts_under_a_name_that_does_not_tell_how_many_there_are_are_refused(tmp_path: Path) -> None:
    tensors = {key.replace("c_attn", "strange"): tensor for key, tensor in merged(2).items()}
    with pytest.raises(ShapeError, match="2 parts of a fused weight") as caught:
        loaded(tmp_path / "a.safetensors", tensors)
    assert len(caught.value.keys) == 2
    with pytest.raises(ShapeError, match="4 parts"):
        loaded(tmp_path / "b.safetensors", merged(4))


def test_factors_that_fit_in_no_reading_are_refused(tmp_path: Path) -> None:
    tensors = {f"{GPT2}.lora_A": torch.ones(5, 12), f"{GPT2}.lora_B": torch.ones(36, 2)}
    with pytest.raises(ShapeError, match="must share the rank"):
        loaded(tmp_path / "a.safetensors", tensors)


def test_parts_of_different_ranks_have_no_fused_form(tmp_path: Path) -> None:
    adapter = loaded(tmp_path / "a.safetensors", merged(3))
    first, *others = adapter.modules.items()
    up, down = pair((12, 12), 9, rank=3)
    from loratools.tensors import from_torch

    wide = first[1]._replace(factors={"up": from_torch("", up), "down": from_torch("", down)}, rank=3)
    mixed = replace(adapter, modules=dict([(first[0], wide), *others]))
    with pytest.raises(LayoutError, match="parts of") as caught:
        lt.save(mixed, tmp_path / "b.safetensors")
    assert len(caught.value.keys) == 3
    k_alone = replace(adapter, modules=dict([others[0]]))
    with pytest.raises(LayoutError, match="parts of"):
        lt.save(k_alone, tmp_path / "b.safetensors")


def test_bare_factors_are_written_without_weight(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", make.GPT2, alpha=4.0, rank=4)
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="loralib")
    written, _ = make.read_safetensors(tmp_path / "b.safetensors")
    assert written == contents(
        {
            key.removeprefix("base_model.model.").removesuffix(".weight"): tensor
            for key, tensor in made.tensors.items()
        }
    )
    again = lt.load(tmp_path / "b.safetensors")
    assert (again.layout.name, again.layout.variant) == ("loralib", "")
    make.assert_close(make.deltas_of(again), made.deltas)


def test_a_computed_adapter_in_the_transposed_form_stays_transposed(tmp_path: Path) -> None:
    up, down = pair((24, 12), 0)
    tensors = {f"{GPT2}.lora_A": down.t().contiguous(), f"{GPT2}.lora_B": up.t().contiguous()}
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    assert adapter.layout.variant == "transposed"
    lt.save(replace(adapter, order=()), tmp_path / "b.safetensors")
    written, _ = make.read_safetensors(tmp_path / "b.safetensors")
    assert written == contents(tensors)


def test_loralib_has_no_prefix_for_a_second_component(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", alpha=4.0, only=["attn1", "self_attn"])
    adapter = lt.load(made.path, arch="sd15")
    encoder = [target for target in adapter.modules if target.component == "text_encoder"]
    with pytest.raises(LayoutError, match="a text_encoder, which only a prefix would tell") as caught:
        directly(adapter, "loralib")
    assert caught.value.keys == tuple(map(str, encoder))
    alone = replace(adapter, modules={target: adapter.modules[target] for target in encoder}, order=())
    for each, way in ((adapter, "--drop text_encoder"), (alone, "can hold them")):
        with pytest.raises(LayoutError, match=way) as caught:
            lt.save(each, tmp_path / "b.safetensors", layout="loralib")
        assert set(caught.value.keys) == keys_of(adapter, encoder)


# The LoRA inside an IP-Adapter


def faceid(prompt: int, numbers: int = 6) -> dict[str, torch.Tensor]:
    """IP-Adapter FaceID's file: projections, image keys and values, and a LoRA on every processor."""
    tensors = {"image_proj.proj.weight": torch.ones(4, 4)}
    for number in range(numbers):
        for name in ("to_q", "to_k", "to_v", "to_out"):
            into = prompt if number % 2 and name in ("to_k", "to_v") else 8
            up, down = pair((8, into), 10 * number + len(name))
            tensors[f"ip_adapter.{number}.{name}_lora.up.weight"] = up
            tensors[f"ip_adapter.{number}.{name}_lora.down.weight"] = down
        if number % 2:
            tensors[f"ip_adapter.{number}.to_k_ip.weight"] = torch.ones(8, prompt)
    return tensors


def read(path: Path, tensors: Mapping[str, torch.Tensor], *, embedded: bool) -> lt.Adapter:
    make.write_safetensors(path, tensors, None)
    opened = io.open_tensors(str(path))
    return formats.read(opened.tensors, metadata=opened.metadata, path=str(path), embedded=embedded)


@pytest.mark.parametrize(
    ("prompt", "arch", "third"),
    [
        (768, "sd15", "input_blocks.2.1.transformer_blocks.0.attn1"),
        (2048, "sdxl", "input_blocks.4.1.transformer_blocks.1.attn1"),
    ],
)
def test_the_lora_in_an_ip_adapter_is_read_on_request(
    prompt: int, arch: str, third: str, tmp_path: Path
) -> None:
    tensors = faceid(prompt)
    adapter = read(tmp_path / "a.safetensors", tensors, embedded=True)
    assert (adapter.type, adapter.arch, len(adapter.modules)) == ("ip-adapter", arch, 24)
    assert {key for key in tensors if "_lora." not in key} == set(adapter.extras)
    deltas = make.deltas_of(adapter)
    for name, leaf in (("to_q", "to_q"), ("to_out", "to_out.0")):
        up, down = (tensors[f"ip_adapter.2.{name}_lora.{role}.weight"] for role in ("up", "down"))
        np.testing.assert_allclose(
            deltas[f"denoiser/{third}.{leaf}"], make.f64(up) @ make.f64(down), rtol=1e-5, atol=1e-6
        )
    assert f"denoiser/{third.replace('attn1', 'attn2')}.to_k" in deltas


def test_an_ip_adapter_is_still_no_lora(tmp_path: Path) -> None:
    tensors = faceid(768)
    adapter = read(tmp_path / "a.safetensors", tensors, embedded=False)
    assert (adapter.type, dict(adapter.modules), set(adapter.extras)) == ("ip-adapter", {}, set(tensors))
    with pytest.raises(NotAnAdapterError, match="IP-Adapter"):
        lt.load(tmp_path / "a.safetensors")
    assert files.read(tmp_path / "a.safetensors").type == "ip-adapter"


@pytest.mark.parametrize("tensors", [faceid(640), faceid(768, numbers=34), faceid(768, numbers=1)])
def test_processors_of_no_known_unet_are_left_alone(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    adapter = read(tmp_path / "a.safetensors", tensors, embedded=True)
    assert (adapter.type, len(adapter.modules)) == ("ip-adapter", 0)


def test_the_lora_of_an_ip_adapter_goes_into_another_layout(tmp_path: Path) -> None:
    adapter = read(tmp_path / "a.safetensors", faceid(768), embedded=True)
    lt.save(adapter, tmp_path / "b.safetensors", layout="diffusers", drop=["extras"])
    again = lt.load(tmp_path / "b.safetensors")
    make.assert_close(make.deltas_of(again), make.deltas_of(adapter))
    header = json.loads(make.read_safetensors(tmp_path / "b.safetensors")[1]["lora_adapter_metadata"])
    assert header["unet.r"] == 2


@pytest.mark.parametrize(("prompt", "arch", "numbers"), [(768, "sd15", 32), (2048, "sdxl", 140)])
@pytest.mark.parametrize("prefix", ["ip_adapter.", ""])
def test_the_processors_of_a_faceid_alone_are_an_adapter(
    prefix: str, prompt: int, arch: str, numbers: int, tmp_path: Path
) -> None:
    whole = faceid(prompt, numbers)
    alone = {
        key.replace("ip_adapter.", prefix): tensor
        for key, tensor in whole.items()
        if not key.startswith("image_proj.")
    }
    make.write_safetensors(tmp_path / "a.safetensors", alone, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert (adapter.type, adapter.arch, adapter.layout.name) == ("adapter", arch, "diffusers")
    assert set(adapter.extras) == {key for key in alone if "to_k_ip" in key}
    inside = read(tmp_path / "b.safetensors", whole, embedded=True)
    make.assert_close(make.deltas_of(adapter), make.deltas_of(inside))
    lt.save(adapter, tmp_path / "c.safetensors", layout="kohya", drop=["extras"])
    make.assert_close(make.deltas_of(lt.load(tmp_path / "c.safetensors")), make.deltas_of(inside))
    lt.save(adapter, tmp_path / "d.safetensors")
    assert make.read_safetensors(tmp_path / "d.safetensors") == make.read_safetensors(
        tmp_path / "a.safetensors"
    )


@pytest.mark.parametrize("numbers", [6, 34])
def test_bare_numbers_that_are_not_a_unet_s_processors_stay_numbers(numbers: int, tmp_path: Path) -> None:
    tensors = {key.removeprefix("ip_adapter."): tensor for key, tensor in faceid(768, numbers).items()}
    lora = {key: tensor for key, tensor in tensors.items() if "_lora." in key}
    make.write_safetensors(tmp_path / "a.safetensors", lora, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert (adapter.arch, len(adapter.modules)) == ("unknown", 4 * numbers)
    assert "0.to_q" in {target.path for target in adapter.modules}


def test_the_lora_in_an_ip_adapter_is_told_with_how_to_take_it_out(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "a.safetensors", faceid(768), None)
    found = lt.info(tmp_path / "a.safetensors")
    assert (found.type, found.modules) == ("ip-adapter", ())
    (said,) = found.warnings
    assert "24 LoRA modules for sd15" in said
    assert "--drop extras" in said
    plain = {key: tensor for key, tensor in faceid(768).items() if "_lora." not in key}
    make.write_safetensors(tmp_path / "b.safetensors", plain, None)
    assert lt.info(tmp_path / "b.safetensors").warnings == ()


def test_attention_processors_know_no_text_encoder_but_clip() -> None:
    """Qwen, Gemma and their like have self_attn.q_proj too."""
    target = Target("text_encoder", "model.layers.0.self_attn.q_proj")
    factors = {"up": from_torch("up", torch.ones(4, 2)), "down": from_torch("down", torch.ones(2, 4))}
    adapter = Adapter(
        {target: Module(target, "lora", factors, 1.0, 2.0, 2, (4, 4))},
        arch="qwen_image",
        layout=Layout("kohya"),
    )
    with pytest.raises(LayoutError):
        formats.document(adapter, Layout("attn-procs"), formats.get("attn-procs"))
