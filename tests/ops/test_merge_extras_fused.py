"""Fused base weights against adapters of their parts, and the other way round: rows by the family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import LayoutError, NameResolutionError, ShapeError
from loratools.model import Rows
from loratools.ops._fused_rows import FAMILIES, in_turn, part_in
from loratools.ops.bake import bake
from loratools.ops.merge import merge

ATTENTION = "model.layers.0.self_attn."
# q 8, k and v 4 rows each, of 6 inputs.
HEIGHTS = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
PHI3 = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {**PHI3, "model_type": "llama"}


def placed(rows: Rows, height: int) -> list[int]:
    """The rows by number."""
    unit = height // rows.of
    return [row for start, stop in rows.spans for row in range(start * unit, stop * unit)]


def base(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, heights: Mapping[str, int], seed: int, inputs: int = 6) -> dict[str, torch.Tensor]:
    """A PEFT adapter of modules by path and height; returns their ΔW."""
    torch.manual_seed(seed)
    folder.mkdir()
    tensors, deltas = {}, {}
    for path, height in heights.items():
        down, up = torch.randn(2, inputs), torch.randn(height, 2)
        tensors |= {
            f"base_model.model.{path}.lora_A.weight": down,
            f"base_model.model.{path}.lora_B.weight": up,
        }
        deltas[path] = 2.0 * up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(heights)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def fused_base(folder: Path) -> Path:
    return base(folder, {ATTENTION + "qkv_proj.weight": (16, 6)}, PHI3)


def split_base(folder: Path) -> Path:
    return base(folder, {f"{ATTENTION}{name}.weight": (rows, 6) for name, rows in HEIGHTS.items()}, LLAMA)


def changed(before: Path, after: Path) -> dict[str, torch.Tensor]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {key.removesuffix(".weight"): new[key] - old[key] for key in old}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_parts_are_baked_into_a_fused_weight(tmp_path: Path) -> None:
    model = fused_base(tmp_path / "base")
    deltas = adapter(tmp_path / "a", {ATTENTION + "v_proj": 4, ATTENTION + "q_proj": 8}, 1)
    bake(model, [lt.load(tmp_path / "a")], tmp_path / "out")
    wanted = torch.zeros(16, 6)
    wanted[:8], wanted[12:] = deltas[ATTENTION + "q_proj"], deltas[ATTENTION + "v_proj"]
    close(changed(model, tmp_path / "out")[ATTENTION + "qkv_proj"], wanted)


def test_parts_lie_between_each_other_where_heads_are_interleaved(tmp_path: Path) -> None:
    path = "gpt_neox.layers.0.attention."
    config = {"model_type": "gpt_neox", "num_attention_heads": 2}
    model = base(tmp_path / "base", {path + "query_key_value.weight": (12, 6)}, config)
    deltas = adapter(tmp_path / "a", {path + "key": 4}, 1)
    bake(model, [lt.load(tmp_path / "a")], tmp_path / "out")
    wanted = torch.zeros(12, 6)
    wanted[[2, 3, 8, 9]] = deltas[path + "key"]
    close(changed(model, tmp_path / "out")[path + "query_key_value"], wanted)


def test_parts_of_a_transposed_weight_are_its_columns(tmp_path: Path) -> None:
    """GPT-2's Conv1D is (in, out)."""
    path = "transformer.h.0.attn."
    shapes = {path + "c_attn.weight": (6, 12), path + "c_attn.bias": (12,)}
    model = base(tmp_path / "base", shapes, {"model_type": "gpt2"})
    deltas = adapter(tmp_path / "a", {path + "k_proj": 4}, 1)
    bake(model, [lt.load(tmp_path / "a")], tmp_path / "out")
    wanted = torch.zeros(6, 12)
    wanted[:, 4:8] = deltas[path + "k_proj"].T
    close(changed(model, tmp_path / "out")[path + "c_attn"], wanted)


def test_a_fused_module_is_baked_into_parts(tmp_path: Path) -> None:
    model = split_base(tmp_path / "base")
    deltas = adapter(tmp_path / "a", {ATTENTION + "qkv_proj": 16}, 1)
    bake(model, [lt.load(tmp_path / "a")], tmp_path / "out")
    found, whole = changed(model, tmp_path / "out"), deltas[ATTENTION + "qkv_proj"]
    for name, rows in zip(HEIGHTS, whole.split([8, 4, 4]), strict=True):
        close(found[ATTENTION + name], rows)


def test_a_family_that_nothing_is_known_of_is_refused(tmp_path: Path) -> None:
    model = base(tmp_path / "base", {ATTENTION + "qkv_proj.weight": (16, 6)}, {"model_type": "new"})
    adapter(tmp_path / "a", {ATTENTION + "q_proj": 8}, 1)
    with pytest.raises(NameResolutionError, match="qkv_proj"):
        bake(model, [lt.load(tmp_path / "a")], tmp_path / "out")


@pytest.mark.parametrize("given", ["nothing", "fused", "split"])
def test_fused_and_split_inputs_are_merged_under_the_names_of_the_base(given: str, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "a", {ATTENTION + "qkv_proj": 16}, 1)[ATTENTION + "qkv_proj"]
    parts = adapter(tmp_path / "b", {f"{ATTENTION}{name}": HEIGHTS[name] for name in ("q_proj", "v_proj")}, 2)
    model = {"nothing": None, "fused": fused_base, "split": split_base}[given]
    where = None if model is None else model(tmp_path / "base")
    inputs = [lt.load(tmp_path / "a"), lt.load(tmp_path / "b")]
    merged, _ = merge(inputs, weights=[0.5, -1.5], base=where)
    wanted = 0.5 * whole
    wanted[:8] -= 1.5 * parts[ATTENTION + "q_proj"]
    wanted[12:] -= 1.5 * parts[ATTENTION + "v_proj"]
    found = {target.path: module.delta() for target, module in merged.modules.items()}
    if given == "split":
        assert found.keys() == {ATTENTION + name for name in HEIGHTS}
        close(torch.cat([found[ATTENTION + name] for name in HEIGHTS]), wanted)
    else:
        assert found.keys() == {ATTENTION + "qkv_proj"}
        close(found[ATTENTION + "qkv_proj"], wanted)


def test_parts_whose_rows_nothing_tells_are_refused(tmp_path: Path) -> None:
    path = "gpt_neox.layers.0.attention."
    adapter(tmp_path / "a", {path + "query_key_value": 12}, 1)
    adapter(tmp_path / "b", {path + "query": 4}, 2)
    inputs = [lt.load(tmp_path / "a"), lt.load(tmp_path / "b")]
    with pytest.raises(LayoutError, match=r"attention\.query in .*--base"):
        merge(inputs)
    config = {"model_type": "gpt_neox", "num_attention_heads": 2}
    model = base(tmp_path / "base", {path + "query_key_value.weight": (12, 6)}, config)
    merged, _ = merge(inputs, base=model)
    assert [target.path for target in merged.modules] == [path + "query_key_value"]


def test_parts_that_do_not_make_up_the_whole_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "a", {"model.layers.0.mlp.gate_up_proj": 20}, 1)
    adapter(tmp_path / "b", {"model.layers.0.mlp.up_proj": 8}, 2)
    with pytest.raises(ShapeError, match=r"20 rows, its parts 8 \+ 8"):
        merge([lt.load(tmp_path / "a"), lt.load(tmp_path / "b")])


def test_all_rows_of_every_family_are_one_parts() -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_kv_heads": 2}
    variants = [{}, {"new_decoder_architecture": True}, {"multi_query": False}]
    for family, weights in FAMILIES.items():
        for fused, more in [(fused, more) for fused in weights for more in variants]:
            rows = fused.rows({"model_type": family, **config, **more})
            assert rows is not None
            covered = sorted(row for own in rows for row in placed(own, own.of))
            assert covered == list(range(rows[0].of)), (family, more)


def test_parts_in_turn_share_what_divides_them() -> None:
    assert in_turn(8, 4, 4) == (Rows(((0, 2),), 4), Rows(((2, 3),), 4), Rows(((3, 4),), 4))


CAUSAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "bloom": ("BloomConfig", {}),
    "persimmon": ("PersimmonConfig", {"qk_layernorm": False}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 1}),
    "falcon old": ("FalconConfig", {"multi_query": False}),
    "falcon one": ("FalconConfig", {"multi_query": True}),
    "falcon new": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 32, "n_head": 4, "n_layer": 1}),
    "gpt_bigcode apart": (
        "GPTBigCodeConfig",
        {"multi_query": False, "n_embd": 32, "n_head": 4, "n_layer": 1},
    ),
    "codegen": ("CodeGenConfig", {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4}),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", CAUSAL)
def test_the_rows_of_a_family_do_what_their_names_say(name: str) -> None:
    """A query is of one position, a key tells on later ones, and only a value on the first by itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, more = CAUSAL[name]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 16}
    if "n_embd" in more or name == "mpt":
        sizes = {"vocab_size": 16}
    config = getattr(transformers, kind)(**sizes, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    said = {**config.to_dict(), "model_type": config.model_type}
    path, layer = next(
        (path, layer)
        for path, layer in model.named_modules()
        if path.rpartition(".")[2] in {fused.leaf for fused in FAMILIES[config.model_type]} and "att" in path
    )
    stem = path.rpartition(".")[0]

    def difference(part: str, position: int) -> torch.Tensor:
        """How far the logits of each position change with a part at one position."""
        meant = part_in(f"{stem}.{part}", said)
        assert meant is not None
        assert meant.path == path

        def disturb(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            rows = placed(meant.rows, output.shape[-1])
            changed[:, position, rows] += 3.0 * noise[: len(rows)]
            return changed

        tokens = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            before = model(tokens).logits[0]
            handle = layer.register_forward_hook(disturb)
            after = model(tokens).logits[0]
            handle.remove()
        return (after - before).abs().amax(dim=1)

    noise = torch.randn(256)
    query, key, value = difference("q_proj", 1), difference("k_proj", 0), difference("v_proj", 0)
    tiny, some = 1e-6, 1e-5
    assert query[1] > some
    assert max(query[0], query[2], query[3]) < tiny
    assert key[0] < tiny
    assert min(key[1:]) > some
    assert value[0] > some
