"""Base checkpoints of the real shapes, filled quickly, and adapters for their attention and MLP layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from loratools.io import build
from loratools.tensors import nbytes
from tests.bench._common import make

Shapes = Mapping[str, tuple[int, ...]]
# Values that are drawn once and repeated: numbers by the billion would take minutes. A prime, so that no matrix
# repeats its rows.
_POOL = 4_194_301
_RANK = 16
CHANGE = 0.1


def sd15() -> dict[str, tuple[int, ...]]:
    """The tensors of a Stable Diffusion 1.5 checkpoint: UNet, text encoder and VAE, 1,066 million values."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in (*_unet(), *_clip(), *_vae()):
        found[name] = shape
    return found


def _unet() -> Iterator[tuple[str, tuple[int, ...]]]:
    top = "model.diffusion_model."
    yield from _layer(f"{top}time_embed.0", 1280, 320)
    yield from _layer(f"{top}time_embed.2", 1280, 1280)
    yield from _layer(f"{top}input_blocks.0.0", 320, 4, 3, 3)
    skips, width = [320], 320
    for level, out in enumerate((320, 640, 1280, 1280)):
        for place in range(2):
            block = f"{top}input_blocks.{1 + 3 * level + place}"
            yield from _resnet(f"{block}.0", width, out)
            width = out
            if level < 3:
                yield from _attention(f"{block}.1", width)
            skips.append(width)
        if level < 3:
            yield from _layer(f"{top}input_blocks.{3 + 3 * level}.0.op", width, width, 3, 3)
            skips.append(width)
    yield from _resnet(f"{top}middle_block.0", 1280, 1280)
    yield from _attention(f"{top}middle_block.1", 1280)
    yield from _resnet(f"{top}middle_block.2", 1280, 1280)
    for level, out in enumerate((1280, 1280, 640, 320)):
        for place in range(3):
            block = f"{top}output_blocks.{3 * level + place}"
            yield from _resnet(f"{block}.0", width + skips.pop(), out)
            width = out
            if level:
                yield from _attention(f"{block}.1", width)
            if place == 2 and level < 3:
                yield from _layer(f"{block}.{2 if level else 1}.conv", width, width, 3, 3)
    yield from _norm(f"{top}out.0", 320)
    yield from _layer(f"{top}out.2", 4, 320, 3, 3)


def _resnet(name: str, width: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.in_layers.0", width)
    yield from _layer(f"{name}.in_layers.2", out, width, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", out, 1280)
    yield from _norm(f"{name}.out_layers.0", out)
    yield from _layer(f"{name}.out_layers.3", out, out, 3, 3)
    if width != out:
        yield from _layer(f"{name}.skip_connection", out, width, 1, 1)


def _attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, 1, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, source in (("attn1", width), ("attn2", 768)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, source)
        yield f"{block}.{attention}.to_v.weight", (width, source)
        yield from _layer(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
    yield from _layer(f"{block}.ff.net.2", width, 4 * width)
    for number in (1, 2, 3):
        yield from _norm(f"{block}.norm{number}", width)
    yield from _layer(f"{name}.proj_out", width, width, 1, 1)


def _clip() -> Iterator[tuple[str, tuple[int, ...]]]:
    top = "cond_stage_model.transformer.text_model."
    yield f"{top}embeddings.token_embedding.weight", (49408, 768)
    yield f"{top}embeddings.position_embedding.weight", (77, 768)
    for number in range(12):
        layer = f"{top}encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{name}", 768, 768)
        yield from _layer(f"{layer}.mlp.fc1", 3072, 768)
        yield from _layer(f"{layer}.mlp.fc2", 768, 3072)
        yield from _norm(f"{layer}.layer_norm1", 768)
        yield from _norm(f"{layer}.layer_norm2", 768)
    yield from _norm(f"{top}final_layer_norm", 768)


def _vae() -> Iterator[tuple[str, tuple[int, ...]]]:
    """As many values as the autoencoder has, in fewer tensors: nothing adapts them."""
    for number in range(35):
        yield from _layer(f"first_stage_model.decoder.block.{number}.conv", 512, 512, 3, 3)


def _layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def llama(layers: int = 16) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of 1.2 thousand million values with 16 layers: 2.5 GB in bfloat16."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 2048)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, shape in (
            ("self_attn.q_proj", (2048, 2048)),
            ("self_attn.k_proj", (512, 2048)),
            ("self_attn.v_proj", (512, 2048)),
            ("self_attn.o_proj", (2048, 2048)),
            ("mlp.gate_proj", (8192, 2048)),
            ("mlp.up_proj", (8192, 2048)),
            ("mlp.down_proj", (2048, 8192)),
        ):
            found[f"{layer}.{name}.weight"] = shape
        found[f"{layer}.input_layernorm.weight"] = (2048,)
        found[f"{layer}.post_attention_layernorm.weight"] = (2048,)
    found["model.norm.weight"] = (2048,)
    return found


def write(path: Path, shapes: Shapes, dtype: str = "F16", *, seed: int = 0, change: float = 0.0) -> Path:
    """A safetensors file of Gaussian weights.

    Args:
        path: The output.
        shapes: Its tensors.
        dtype: "F16" or "BF16".
        seed: Of the values.
        change: By how much, relative to their size, matrices differ from the file of the same seed without a change:
            by turns by heavy tails, low rank and noise, and low rank.
    """
    generator = np.random.default_rng(seed)
    pool = generator.standard_normal(_POOL, np.float32) * np.float32(0.02)
    tails = generator.standard_t(2.5, _POOL).astype(np.float32) * np.float32(0.02 * change)
    plain = _stored(pool, dtype)
    with open(path, "wb") as file:
        file.write(build([(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"}))
        for number, (name, shape) in enumerate(shapes.items()):
            start = number * 7919 % _POOL
            if change and changed(name, shape):
                for values in _tuned(pool, tails, shape, start, number):
                    file.write(_stored(values, dtype))
                continue
            left, start = nbytes(shape, dtype), 2 * start
            while left:
                piece = plain[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0
    return path


def changed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this name differs in a file written with a change."""
    return len(shape) > 1 and "first_stage" not in name and "embed" not in name


def _tuned(
    pool: np.ndarray, tails: np.ndarray, shape: tuple[int, ...], start: int, number: int
) -> Iterator[np.ndarray]:
    """A tensor's values with a difference of heavy tails, low rank and noise, or low rank, a few rows at a time."""
    out, width = shape[0], int(np.prod(shape[1:]))
    generator = np.random.default_rng(number)
    up, down = (generator.standard_normal(size, np.float32) for size in ((out, _RANK), (_RANK, width)))
    noise = np.float32((1.0, 0.3, 0.0)[number % 3])
    low = np.float32(0.0 if number % 3 == 0 else float(tails.std()) / _RANK**0.5)
    rows = max(1, _POOL // width)
    for row in range(0, out, rows):
        part = up[row : row + rows] @ down * low
        places = np.arange(part.size) + (start + row * width)
        yield pool.take(places, mode="wrap") + part.ravel() + noise * tails.take(places, mode="wrap")


def _stored(values: np.ndarray, dtype: str) -> memoryview:
    if dtype == "F16":
        return memoryview(values.astype(np.float16)).cast("B")
    return memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")


def write_sharded(folder: Path, shapes: Shapes, most: int = 500_000_000, **options: float) -> Path:
    """A sharded bfloat16 model with index and configuration, as Hugging Face's library saves it."""
    folder.mkdir()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        if held and held + nbytes(shape, "BF16") > most:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += nbytes(shape, "BF16")
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write(folder / name, group, "BF16", seed=number, **options)
        index.update(dict.fromkeys(group, name))
    total = sum(nbytes(shape, "BF16") for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    return folder


def sd15_adapter(path: Path, rank: int = 32) -> Path:
    """A Kohya file for the 264 attention and MLP layers of Stable Diffusion 1.5."""
    return make(path, rank=rank, modules=_sd15_modules(), version="sd_v1-5")


def _sd15_modules() -> Iterable[tuple[str, tuple[int, int]]]:
    for name, shape in sd15().items():
        path = name.removesuffix(".weight")
        if path == name or len(shape) < 2 or "embedding" in name:
            continue
        if "transformer_blocks" in path or path.endswith(("proj_in", "proj_out")):
            twin = _diffusers(path.removeprefix("model.diffusion_model.")).replace(".", "_")
            yield f"lora_unet_{twin}", (shape[0], shape[1])
        elif path.startswith("cond_stage_model"):
            twin = path.removeprefix("cond_stage_model.transformer.").replace(".", "_")
            yield f"lora_te_{twin}", (shape[0], shape[1])


def _diffusers(path: str) -> str:
    """A UNet block's path in the names that Kohya's trainer uses for SD1.5."""
    half, rest = path.split(".", 1)
    if half == "middle_block":
        return "mid_block.attentions.0." + rest.split(".", 1)[1]
    number, _, inside = rest.split(".", 2)
    if half == "input_blocks":
        return f"down_blocks.{(int(number) - 1) // 3}.attentions.{(int(number) - 1) % 3}.{inside}"
    return f"up_blocks.{int(number) // 3}.attentions.{int(number) % 3}.{inside}"


def llama_adapter(folder: Path, layers: int = 16, rank: int = 32) -> Path:
    """A PEFT folder for all linear layers of the Llama."""
    from safetensors.numpy import save_file

    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in llama(layers).items():
        if len(shape) == 2 and "embed" not in name:
            stem = "base_model.model." + name.removesuffix(".weight")
            for role, size in (("lora_A", (rank, shape[1])), ("lora_B", (shape[0], rank))):
                values = generator.standard_normal(size, np.float32) * np.float32(0.01)
                tensors[f"{stem}.{role}.weight"] = values.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
