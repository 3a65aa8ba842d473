"""GGUF and torchtune adapters: reference files, orders of rows, one alpha for all, and what neither holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools import formats, io
from loratools.errors import LayoutError, OptionError, ShapeError
from loratools.ops import _host, _row_orders, convert
from loratools.tensors import from_torch
from tests.cli.running import invoke

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracle"
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference results are not here")
HEADS, KV_HEADS, WIDTH = 4, 2, 4
MODULES = {
    "self_attn.q_proj": (HEADS * WIDTH, 12),
    "self_attn.k_proj": (KV_HEADS * WIDTH, 12),
    "self_attn.v_proj": (KV_HEADS * WIDTH, 12),
    "mlp.down_proj": (12, 20),
}


def base_of(folder: Path, model_type: str = "llama", **more: object) -> Path:
    """A model's folder with a configuration alone."""
    said = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, **more}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def peft_of(
    folder: Path, *, dtype: torch.dtype = torch.float32, ranks: dict[str, int] | None = None, **config
) -> Path:
    """A PEFT folder of one layer."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (out, width) in MODULES.items():
        rank = (ranks or {}).get(name, 3)
        stem = f"base_model.model.model.layers.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [*MODULES], **config}
    said["rank_pattern"] = dict(ranks or {})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Halves of each head's rows side by side, written as a loop."""
    width = len(rows) // heads
    found = np.empty_like(rows)
    for head in range(heads):
        for place in range(width):
            side, pair = place % 2, place // 2
            found[head * width + place] = rows[head * width + side * (width // 2) + pair]
    return found


def runtime(path: Path) -> dict[str, np.ndarray]:
    """ΔW by llama.cpp's names, as its source computes it."""
    with io.open_tensors(path) as opened:
        alpha = np.float32(opened.metadata["adapter.lora.alpha"])
        found = {}
        for name, ref in opened.tensors.items():
            if name.endswith(".lora_a"):
                a, b = (
                    ref.numpy().astype(np.float64),
                    opened.tensors[name[:-1] + "b"].numpy().astype(np.float64),
                )
                scale = alpha / np.float32(b.shape[-1]) if alpha else 1.0
                found[name.removesuffix(".weight.lora_a")] = scale * (b @ a)
    return found


@needs_oracle
@pytest.mark.parametrize("case", ["llama_bin", "llama_rank_pattern", "llama_embedding", "gpt2_conv1d"])
def test_the_reference_converter_writes_the_same(case: str, tmp_path: Path) -> None:
    folder = ORACLE / f"gguf__{case}"
    if case == "llama_embedding":
        with pytest.raises(LayoutError, match=r"base_layer\.weight"):
            convert.convert(lt.load(folder / "input" / "adapter"), "gguf", base=folder / "input" / "base")
    convert.convert_file(
        folder / "input" / "adapter",
        tmp_path / "x.gguf",
        to="gguf",
        base=folder / "input" / "base",
        drop=["extras"] if case == "llama_embedding" else [],
    )
    wanted = load_file(folder / "expected" / "decoded.safetensors")
    if case == "gpt2_conv1d":  # the other tool takes one factor's transpose for the other
        before = load_file(folder / "input" / "adapter" / "adapter_model.safetensors")
        names = {
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }
        wanted = {
            f"blk.{layer}.{own}.weight.lora_{side}": before[
                f"base_model.model.transformer.h.{layer}.{theirs}.lora_{side.upper()}.weight"
            ]
            for layer in (0, 1)
            for theirs, own in names.items()
            for side in "ab"
        }
    with (
        io.open_tensors(tmp_path / "x.gguf") as opened,
        io.open_tensors(folder / "expected" / "lora.gguf") as other,
    ):
        assert opened.tensors.keys() == wanted.keys()
        assert all(torch.equal(opened.tensors[key].load(), wanted[key]) for key in wanted)
        for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
            assert opened.metadata[key] == other.metadata[key]


@needs_oracle
@pytest.mark.parametrize("case", ["llama_bin", "llama_rank_pattern", "llama_embedding", "gpt2_conv1d"])
def test_the_reference_file_is_saved_as_it_is(case: str, tmp_path: Path) -> None:
    path = ORACLE / f"gguf__{case}" / "expected" / "lora.gguf"
    adapter = lt.load(path)
    assert adapter.layout.name == "gguf"
    lt.save(adapter, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == path.read_bytes()


@needs_oracle
@pytest.mark.parametrize(
    ("case", "cause", "word"),
    [
        ("llama_dora", "lora_magnitude_vector", "--drop magnitude"),
        ("qwen2_bias_all", "q_proj.base_layer.bias", "--drop extras"),
    ],
)
def test_what_llama_cpp_cannot_apply_is_refused_by_name(case: str, cause: str, word: str) -> None:
    folder = ORACLE / f"gguf__{case}" / "input"
    with pytest.raises(LayoutError, match=cause) as caught:
        convert.convert(lt.load(folder / "adapter"), "gguf", base=folder / "base")
    assert word in caught.value.todo


@needs_oracle
def test_packed_experts_are_stacked(tmp_path: Path) -> None:
    folder = ORACLE / "gguf__mixtral_target_parameters" / "input"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    count = json.loads((folder / "base" / "config.json").read_text())["num_local_experts"]
    convert.convert_file(folder / "adapter", tmp_path / "x.gguf", to="gguf", base=folder / "base")
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    scale, rank = config["lora_alpha"] / config["r"], config["r"]

    def deltas(stem: str) -> torch.Tensor:
        down = factors[f"{stem}.lora_A.weight"].double().reshape(count, rank, -1)
        up = factors[f"{stem}.lora_B.weight"].double().reshape(-1, rank, count).permute(2, 0, 1)
        return scale * (up @ down)

    found = runtime(tmp_path / "x.gguf")
    stems = {key.split(".lora_")[0] for key in factors}
    for stem in (each for each in stems if each.endswith(".experts")):
        block = f"blk.{stem.split('.layers.')[1].split('.')[0]}"
        gate, up = deltas(f"{stem}.base_layer").chunk(2, dim=1)
        wanted = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": deltas(stem)}
        for name, delta in wanted.items():
            np.testing.assert_allclose(found.pop(f"{block}.{name}"), delta, rtol=1e-5, atol=1e-6)
    assert {name.rpartition(".")[2] for name in found} == {"attn_q", "attn_v"}


@needs_oracle
def test_torchtune_reference(tmp_path: Path) -> None:
    folder = ORACLE / "torchtune__llama_to_peft"
    adapter = lt.load(folder / "input" / "adapter.safetensors")
    wanted = load_file(folder / "expected" / "peft.safetensors")
    host = _host.Host(heads=4, kv_heads=2)
    found = _row_orders.as_transformers(adapter, host)
    magnitudes = [module for module in found.modules.values() if module.magnitude is not None]
    assert magnitudes
    for module in found.modules.values():
        stem = f"base_model.model.{module.target.path}"
        assert torch.equal(module.factors["up"].load(), wanted[f"{stem}.lora_B.weight"])
        assert torch.equal(module.factors["down"].load(), wanted[f"{stem}.lora_A.weight"])
    # The other tool leaves the magnitude's rows where they were; they belong to those of lora_B.
    (module,) = magnitudes
    own = adapter.modules[module.target]
    rows = [own.factors["up"].numpy().tolist().index(row) for row in module.factors["up"].numpy().tolist()]
    assert torch.equal(module.magnitude.load(), own.magnitude.load()[rows])
    assert rows != sorted(rows)
    convert.convert_file(
        folder / "input" / "adapter.safetensors",
        tmp_path / "peft",
        to="peft",
        heads=4,
        kv_heads=2,
        drop=["magnitude"],
    )
    convert.convert_file(tmp_path / "peft", tmp_path / "tune", to="torchtune", heads=4, kv_heads=2)
    again = load_file(tmp_path / "tune" / "adapter_0.safetensors")
    before = load_file(folder / "input" / "adapter.safetensors")
    assert before.keys() - again.keys() == {"layers.0.attn.q_proj.magnitude"}
    assert all(torch.equal(again[key], before[key]) for key in again)


@pytest.mark.parametrize("layout", ["gguf", "torchtune"])
@settings(max_examples=12, deadline=None)
@given(alpha=st.floats(0.1, 64), rslora=st.booleans(), rank=st.integers(1, 5))
def test_there_and_back(layout: str, alpha: float, rslora: bool, rank: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("there")
    base = base_of(folder / "base")
    ranks = {"self_attn.q_proj": rank} if layout == "gguf" else dict.fromkeys(MODULES, rank)
    given_ = peft_of(
        folder / "peft", ranks=ranks, lora_alpha=alpha, use_rslora=rslora, alpha_pattern={"down_proj": 8}
    )
    there = folder / ("x.gguf" if layout == "gguf" else "tune")
    convert.convert_file(given_, there, to=layout, base=base)
    report = convert.convert_file(there, folder / "back", to="peft", base=base)
    before, after = lt.load(given_), lt.load(folder / "back")
    assert before.modules.keys() == after.modules.keys()
    make.assert_close(make.deltas_of(after), make.deltas_of(before), 1e-6)
    assert report.error is not None


def test_llama_cpp_computes_what_peft_does(tmp_path: Path) -> None:
    ranks = {"self_attn.k_proj": 2, "mlp.down_proj": 5}
    given_ = peft_of(
        tmp_path / "peft", ranks=ranks, use_rslora=True, alpha_pattern={"q_proj": 3, "v_proj": 12}
    )
    convert.convert_file(given_, tmp_path / "x.gguf", to="gguf", base=base_of(tmp_path / "base"))
    found = runtime(tmp_path / "x.gguf")
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    assert len(found) == len(MODULES)
    for target, module in lt.load(given_).modules.items():
        name = names.get(target.path.removeprefix("model.layers.0."), "ffn_down")
        wanted = module.delta().double().numpy()
        wanted = interleaved(wanted, heads[name]) if name in heads else wanted
        np.testing.assert_allclose(found[f"blk.0.{name}"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alphas_by_powers_of_two_round_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    given_ = peft_of(tmp_path / "peft", dtype=dtype, alpha_pattern={"v_proj": 12, "down_proj": 1.5})
    adapter = lt.load(given_)
    made = convert.convert(adapter, "gguf", base=base_of(tmp_path / "base"))
    found = {ref.name: ref.load() for ref in made.document.tensors}
    v = next(each for target, each in adapter.modules.items() if target.path.endswith("v_proj"))
    scale = float(made.document.metadata["adapter.lora.alpha"]) / 3
    assert scale == 2.0
    product = found["blk.0.attn_v.weight.lora_b"].double() @ found["blk.0.attn_v.weight.lora_a"].double()
    assert torch.equal(
        scale * product, 4.0 * (v.factors["up"].load().double() @ v.factors["down"].load().double())
    )


@pytest.mark.parametrize(
    ("model_type", "moved"),
    [("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", False), ("gemma", False)],
)
def test_only_some_architectures_have_another_order(model_type: str, moved: bool, tmp_path: Path) -> None:
    adapter = lt.load(peft_of(tmp_path / "peft"))
    made = convert.convert(adapter, "gguf", base=base_of(tmp_path / "base", model_type))
    found = {ref.name: ref for ref in made.document.tensors}
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", 0)):
        up = next(
            each for target, each in adapter.modules.items() if target.path.endswith(f"{name}_proj")
        ).factors["up"]
        wanted = interleaved(up.numpy(), heads) if moved and heads else up.numpy()
        np.testing.assert_array_equal(found[f"blk.0.attn_{name}.weight.lora_b"].numpy(), wanted)


@pytest.mark.parametrize(
    ("model_type", "kv_heads"), [("gpt_neox", 4), ("bloom", 4), ("falcon", 2), ("falcon", 1)]
)
def test_fused_queries_keys_and_values(model_type: str, kv_heads: int, tmp_path: Path) -> None:
    path = {"gpt_neox": "gpt_neox.layers.0.attention.query_key_value"}.get(
        model_type, "transformer.h.0.self_attention.query_key_value"
    )
    groups, width = (HEADS if model_type != "falcon" else kv_heads), 3
    rows = groups * (HEADS // groups + 2) * width
    up = torch.arange(rows * 2, dtype=torch.float32).reshape(rows, 2)
    (tmp_path / "peft").mkdir()
    stem = f"base_model.model.{path}"
    save_file(
        {f"{stem}.lora_A.weight": torch.randn(2, 5), f"{stem}.lora_B.weight": up},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query_key_value"]})
    )
    more = {"new_decoder_architecture": kv_heads > 1, "multi_query": True} if model_type == "falcon" else {}
    base = base_of(tmp_path / "base", model_type, num_kv_heads=kv_heads, num_key_value_heads=None, **more)
    made = convert.convert(lt.load(tmp_path / "peft"), "gguf", base=base)
    found = {ref.name: ref.numpy() for ref in made.document.tensors}["blk.0.attn_qkv.weight.lora_b"]
    # As llama.cpp's converter has it: all queries, all keys, all values.
    grouped = up.numpy().reshape(groups, HEADS // groups + 2, width, 2)
    wanted = [grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]]
    np.testing.assert_array_equal(found, np.concatenate([part.reshape(-1, 2) for part in wanted]))


def test_what_is_not_known_of_the_model_is_asked_for(tmp_path: Path) -> None:
    adapter = lt.load(peft_of(tmp_path / "peft"))
    with pytest.raises(LayoutError, match="unknown type") as caught:
        convert.convert(adapter, "gguf")
    assert "--base" in caught.value.todo
    with pytest.raises(LayoutError, match="models of type mamba"):
        convert.convert(adapter, "gguf", base=base_of(tmp_path / "base", "mamba"))
    with pytest.raises(OptionError, match="how many heads") as asked:
        convert.convert(adapter, "torchtune")
    assert "--kv-heads" in asked.value.todo
    with pytest.raises(OptionError, match="how many heads"):
        convert.convert(adapter, "torchtune", heads=HEADS)
    with pytest.raises(ShapeError, match="do not make one model"):
        convert.convert(adapter, "torchtune", heads=HEADS, kv_heads=HEADS)
    with pytest.raises(ShapeError, match="do not divide"):
        convert.convert(adapter, "torchtune", heads=4 * HEADS, kv_heads=4 * KV_HEADS)
    with pytest.raises(OptionError, match="do not divide"):
        convert.convert(adapter, "torchtune", heads=4, kv_heads=3)


def test_a_tied_output_has_no_name_there(tmp_path: Path) -> None:
    folder = peft_of(tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(3, 12)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(30, 3)
    save_file(tensors, folder / "adapter_model.safetensors")
    tied = base_of(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(LayoutError, match="tie_word_embeddings"):
        convert.convert(lt.load(folder), "gguf", base=tied)
    kept = convert.convert(lt.load(folder), "gguf", base=tied, drop=["unnamed"])
    assert not any(ref.name.startswith("output.") for ref in kept.document.tensors)
    untied = convert.convert(lt.load(folder), "gguf", base=base_of(tmp_path / "untied"))
    assert any(ref.name.startswith("output.") for ref in untied.document.tensors)


def test_rows_in_different_orders_are_not_combined(tmp_path: Path) -> None:
    given_ = peft_of(tmp_path / "peft")
    base = base_of(tmp_path / "base")
    convert.convert_file(given_, tmp_path / "x.gguf", to="gguf", base=base)
    for second, out, more in (
        (given_, "m.gguf", ()),
        (tmp_path / "x.gguf", "m", ("--to", "peft")),
    ):
        result = invoke("merge", tmp_path / "x.gguf", second, "-o", tmp_path / out, *more)
        assert result.exit_code == 1
        assert "in another order" in result.stderr
    assert (
        invoke("merge", tmp_path / "x.gguf", tmp_path / "x.gguf", "-o", tmp_path / "two.gguf").exit_code == 0
    )
    one, two = runtime(tmp_path / "x.gguf"), runtime(tmp_path / "two.gguf")
    for name, delta in one.items():
        np.testing.assert_allclose(two[name], 2 * delta, rtol=1e-5, atol=1e-5)


def test_a_base_puts_rows_in_order(tmp_path: Path) -> None:
    given_ = peft_of(tmp_path / "peft")
    base = base_of(tmp_path / "base")
    weights = {f"model.layers.0.{name}.weight": torch.zeros(shape) for name, shape in MODULES.items()}
    save_file(weights, base / "model.safetensors")
    convert.convert_file(given_, tmp_path / "x.gguf", to="gguf", base=base)
    for adapter, out in ((given_, "one"), (tmp_path / "x.gguf", "two")):
        assert invoke("bake", base, adapter, "-o", tmp_path / out).exit_code == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in weights)
    assert all(one[key].any() for key in weights)


def test_the_command_and_its_files(tmp_path: Path) -> None:
    given_, base = peft_of(tmp_path / "peft"), base_of(tmp_path / "base")
    assert (
        "ends in .gguf" in invoke("convert", given_, "-o", tmp_path / "x.safetensors", "--to", "gguf").stderr
    )
    dry = invoke(
        "convert", given_, "-o", tmp_path / "x.gguf", "--to", "gguf", "--base", base, "--dry-run", "--json"
    )
    done = invoke(
        "convert", given_, "-o", tmp_path / "x.gguf", "--to", "gguf", "--base", base / "config.json", "--json"
    )
    assert (dry.exit_code, done.exit_code) == (0, 0)
    assert (
        json.loads(dry.stdout)["bytes"]
        == json.loads(done.stdout)["bytes"]
        == (tmp_path / "x.gguf").stat().st_size
    )
    shown = invoke("info", tmp_path / "x.gguf", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["layout"] == "gguf"


def test_invocation_tokens_travel(tmp_path: Path) -> None:
    given_, base = peft_of(tmp_path / "peft", alora_invocation_tokens=[5, 6]), base_of(tmp_path / "base")
    convert.convert_file(given_, tmp_path / "x.gguf", to="gguf", base=base)
    with io.open_tensors(tmp_path / "x.gguf") as opened:
        assert json.loads(opened.metadata["adapter.alora.invocation_tokens"]) == [5, 6]
        # As other programs write it, without what we remember of the configuration.
        theirs = {key: text for key, text in opened.metadata.items() if not key.startswith("loratools.")}
        io.write_gguf(tmp_path / "theirs.gguf", opened.tensors.values(), theirs)
    for name in ("x", "theirs"):
        convert.convert_file(tmp_path / f"{name}.gguf", tmp_path / name, to="peft", base=base)
        assert lt.load(tmp_path / name).config["alora_invocation_tokens"] == [5, 6]


def test_torchtune_gets_one_rank_by_zeros_alone(tmp_path: Path) -> None:
    given_ = peft_of(tmp_path / "peft", ranks={"mlp.down_proj": 5}, alpha_pattern={"down_proj": 10})
    base = base_of(tmp_path / "base")
    report = convert.convert_file(given_, tmp_path / "tune", to="torchtune", base=base)
    # 6 / 3 and 10 / 5 are one scale: nothing is left to be folded.
    assert report.fates == {"moved": 2, "padded": 6}
    said = json.loads((tmp_path / "tune" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (5, 10)
    found = load_file(tmp_path / "tune" / "adapter_0.safetensors")
    before = load_file(given_ / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.v_proj"
    down, up = (found[f"layers.0.attn.v_proj.lora_{side}.weight"] for side in "ab")
    assert torch.equal(down[:3], before[f"{stem}.lora_A.weight"])
    assert not down[3:].any()
    assert torch.equal(up[:, :3], before[f"{stem}.lora_B.weight"])
    assert not up[:, 3:].any()


def test_torchtune_gets_one_scale_beside_one_rank(tmp_path: Path) -> None:
    given_ = peft_of(
        tmp_path / "peft", ranks={"mlp.down_proj": 5}, alpha_pattern={"down_proj": 7, "k_proj": 1}
    )
    base = base_of(tmp_path / "base")
    convert.convert_file(given_, tmp_path / "tune", to="torchtune", base=base)
    convert.convert_file(tmp_path / "tune", tmp_path / "back", to="peft", base=base)
    before, after = lt.load(given_), lt.load(tmp_path / "back")
    assert {module.rank for module in after.modules.values()} == {5}
    make.assert_close(make.deltas_of(after), make.deltas_of(before), 1e-6)


def test_modules_of_several_ranks_are_no_torchtune_file(tmp_path: Path) -> None:
    adapter = lt.load(peft_of(tmp_path / "peft", ranks={"mlp.down_proj": 5}))
    form = formats.get("torchtune")
    with pytest.raises(LayoutError, match="one rank for all modules, and these have 3, 5") as caught:
        formats.document(adapter, convert.files.layout_of(form, "safetensors"), form)
    assert caught.value.expected
    assert "convert FILE --to torchtune" in caught.value.todo


STRANGE = {"strange": 0, "my_field": "x", "init_lora_weights": "gaussian"}
NAMED = "3 fields of adapter_config.json have no place there: init_lora_weights, my_field, strange"
UNSET = {
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "eva_config": None,
    "loftq_config": {},
    "base_model_name_or_path": "some/model",
    "peft_version": "0.21.2",
    "use_rslora": False,
    "lora_dropout": 0.1,
}


@pytest.mark.parametrize(
    ("to", "kept"),
    [
        ("gguf", True),
        ("llama.cpp", True),
        ("torchtune", True),
        ("mlx", True),
        ("vllm", False),
        ("sglang", False),
    ],
)
def test_fields_without_a_place_are_named(to: str, kept: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = lt.load(peft_of(tmp_path / "peft", **{**UNSET, **STRANGE}))
    found = convert.convert(adapter, to, base=base)
    (note,) = (each for each in found.notes if "adapter_config.json" in each)
    assert note == NAMED + ("; the header keeps what it says" if kept else "")
    held = json.loads(found.document.metadata.get("loratools.adapter_config", "{}"))
    assert [STRANGE.items() <= each.items() for each in held.values()] == [True] * kept
    one = convert.convert(lt.load(peft_of(tmp_path / "one", strange=None)), to, base=base)
    assert any("1 field of adapter_config.json has no place there: strange" in each for each in one.notes)


@pytest.mark.parametrize("to", ["gguf", "torchtune", "mlx", "vllm", "peft"])
def test_what_peft_writes_of_itself_is_not_named(to: str, tmp_path: Path) -> None:
    given_ = peft_of(tmp_path / "peft", **UNSET)
    found = convert.convert(lt.load(given_), to, base=base_of(tmp_path / "base"))
    assert not any("adapter_config.json" in note for note in found.notes)


def test_peft_keeps_every_field(tmp_path: Path) -> None:
    found = convert.convert(lt.load(peft_of(tmp_path / "peft", **STRANGE)), "peft", dtype="float16")
    assert found.document.config is not None
    assert STRANGE.items() <= found.document.config.items()
    assert not any("no place" in note for note in found.notes)


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_gpt2_is_known_by_its_names_to_store_inputs_first(to: str, tmp_path: Path) -> None:
    shapes = {"attn.c_attn": (36, 12), "mlp.c_proj": (12, 48)}
    tensors = {}
    for name, (out, width) in shapes.items():
        stem = f"base_model.model.transformer.h.0.{name}"
        tensors |= {
            f"{stem}.lora_A.weight": torch.randn(3, width),
            f"{stem}.lora_B.weight": torch.randn(out, 3),
        }
    given_ = tmp_path / "peft"
    given_.mkdir()
    save_file(tensors, given_ / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [*shapes], "fan_in_fan_out": True}
    (given_ / "adapter_config.json").write_text(json.dumps(said))
    base, there = base_of(tmp_path / "base", "gpt2"), tmp_path / ("x.gguf" if to == "gguf" else "x")
    convert.convert_file(given_, there, to=to, base=base)
    adapter = lt.load(there)
    assert [module.in_first for module in adapter.modules.values()] == [True, True]
    convert.convert_file(there, tmp_path / "back", to="peft", base=base)
    assert lt.load(tmp_path / "back").config["fan_in_fan_out"] is True
    # Written anew, it has the names that it came with.
    anew = convert.convert(adapter, to, dtype="float16", base=base).document.tensors
    assert {ref.name for ref in anew} == set(adapter.order)


@pytest.mark.parametrize("layout", ["gguf", "mlx"])
def test_other_models_do_not_store_inputs_first(layout: str, tmp_path: Path) -> None:
    there = tmp_path / ("x.gguf" if layout == "gguf" else "x")
    convert.convert_file(peft_of(tmp_path / "peft"), there, to=layout, base=base_of(tmp_path / "base"))
    assert not any(module.in_first for module in lt.load(there).modules.values())


def test_stacked_experts_are_read_and_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"lora_a": (3, 2, 8), "lora_b": (3, 6, 2)}
    refs = [
        from_torch(f"blk.0.ffn_{name}_exps.weight.{side}", torch.randn(shape, generator=generator))
        for name in ("gate", "up")
        for side, shape in shapes.items()
    ]
    metadata = {"general.architecture": "qwen3moe", "general.type": "adapter", "adapter.lora.alpha": "6.0"}
    io.write_gguf(tmp_path / "x.gguf", refs, metadata)
    adapter = lt.load(tmp_path / "x.gguf")
    assert {(module.kind, module.scale) for module in adapter.modules.values()} == {("experts", 3.0)}
    told = json.loads(invoke("info", tmp_path / "x.gguf", "--json").stdout)
    assert [module["experts"] for module in told["modules"]] == [3, 3]
    assert "experts (3 experts a layer)" in invoke("info", tmp_path / "x.gguf").stdout
    assert [target.path for target in adapter.modules] == [
        f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate", "up")
    ]
    again = formats.document(replace(adapter, order=()), adapter.layout, formats.get("gguf"))
    assert again.metadata["adapter.lora.alpha"] == "6.0"
    assert {ref.name: ref.shape for ref in again.tensors} == {ref.name: ref.shape for ref in refs}
