"""Normal forms: what programs that serve adapters make of the output is what the input was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import ArchitectureError, LayoutError, OptionError, UnsupportedKindError
from loratools.ops.convert import convert_file
from tests.cli.running import invoke

PATHS = [path for path, _ in make.LLAMA]
SERVING = ("vllm", "sglang", "lorax")
ATTENTION = [(path, shape) for path, shape in make.LLAMA if "self_attn" in path]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    found, _ = make.read_safetensors(folder / "adapter_model.safetensors")
    kinds = {"F32": np.float32, "F16": np.float16}
    arrays = {
        key: np.frombuffer(data, kinds[dtype]).reshape(shape).astype(np.float64)
        for key, (dtype, shape, data) in found.items()
    }
    return config, arrays


def served(folder: Path, program: str) -> dict[str, np.ndarray]:
    """ΔW of every module as a program computes it: one scale of the configuration, whatever else that says."""
    config, arrays = read(folder)
    rank = config["r"]
    root = program in ("vllm", "lorax") and config.get("use_rslora", False)
    scale = config["lora_alpha"] / (math.sqrt(rank) if root else rank)
    assert isinstance(config["target_modules"], list)
    assert not config.get("use_dora")
    assert not config.get("modules_to_save")
    assert config.get("bias") == "none"
    found: dict[str, np.ndarray] = {}
    for key, down in arrays.items():
        if key.endswith(".lora_B.weight"):
            continue
        assert key.startswith("base_model.model.")
        assert key.endswith(".lora_A.weight"), key
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert path.rpartition(".")[2] in config["target_modules"]
        up = arrays[key.replace("lora_A", "lora_B")]
        # SGLang cuts its buffers at the configuration's rank.
        found[path] = scale * (up[:, :rank] @ down[:rank])
    return found


def check(folder: Path, program: str, made: make.Made, rtol: float = 1e-6) -> None:
    found = served(folder, program)
    expected = {key.rpartition(":")[2] if ":" in key else key: value for key, value in made.deltas.items()}
    by_path = {key.split("/")[-1]: value for key, value in expected.items()}
    for path, want in by_path.items():
        assert np.linalg.norm(found[path] - want) <= rtol * np.linalg.norm(want), path
    for path in found.keys() - by_path.keys():
        assert not found[path].any(), path


@pytest.mark.parametrize("program", SERVING)
@pytest.mark.parametrize("rslora", [False, True])
def test_one_rank_and_one_scale(program: str, rslora: bool, tmp_path: Path) -> None:
    made = make.peft(
        tmp_path / "in",
        ranks={PATHS[0]: 7, PATHS[2]: 1},
        alphas={PATHS[1]: 3.0, PATHS[3]: 16.0},
        config={"use_rslora": rslora},
    )
    report = convert_file(made.path, tmp_path / "out", to=program)
    assert report.runtime == program
    assert set(report.ranks) == {7}
    assert report.error is not None
    assert report.error <= 1e-6
    config, _ = read(tmp_path / "out")
    assert config["r"] == 7
    assert "rank_pattern" not in config
    assert "alpha_pattern" not in config
    check(tmp_path / "out", program, made)
    assert not [
        each for each in lt.doctor(tmp_path / "out", runtime=program).findings if each.severity == "error"
    ]


def test_padding_alone_keeps_every_bit(tmp_path: Path) -> None:
    # Alphas that make one scale of all.
    made = make.peft(tmp_path / "in", rank=4, alpha=8.0, ranks={PATHS[0]: 8}, alphas={PATHS[0]: 16.0})
    report = convert_file(made.path, tmp_path / "out", to="vllm")
    assert report.error == 0.0
    assert all(each.exact and each.changes == ("padded",) for each in report.normalised)
    assert len(report.normalised) == len(PATHS) - 1
    assert report.fates == {"moved": 2, "padded": 2 * len(PATHS) - 2}
    _, arrays = read(tmp_path / "out")
    down = arrays[f"base_model.model.{PATHS[1]}.lora_A.weight"]
    assert np.array_equal(down[:4], made.tensors[f"base_model.model.{PATHS[1]}.lora_A.weight"].numpy())
    assert not down[4:].any()


@given(
    ranks=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    powers=st.lists(st.integers(-3, 3), min_size=5, max_size=5),
)
@settings(max_examples=12, deadline=None)
def test_scales_a_power_of_two_apart_round_nothing(
    ranks: list[int], powers: list[int], tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("law")
    made = make.peft(
        folder / "in",
        ranks=dict(zip(PATHS, ranks, strict=True)),
        alphas={path: rank * 2.0**power for path, rank, power in zip(PATHS, ranks, powers, strict=True)},
    )
    report = convert_file(made.path, folder / "out", to="vllm")
    assert all(each.exact for each in report.normalised)
    assert report.error == 0.0
    check(folder / "out", "vllm", made, 1e-12)


@pytest.mark.parametrize(("rank", "bucket"), [(3, 8), (8, 8), (17, 32), (300, 320)])
def test_the_next_rank_that_vllm_provides_for(rank: int, bucket: int, tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", rank=rank, model=ATTENTION)
    report = convert_file(made.path, tmp_path / "out", to="vllm", bucket=True)
    assert set(report.ranks) == {bucket}
    check(tmp_path / "out", "vllm", made)
    told = [note for note in report.notes if f"--max-lora-rank {bucket}" in note]
    assert bool(told) == (bucket > 16)


def test_a_rank_over_the_last_limit_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", rank=4, ranks={PATHS[0]: 513})
    with pytest.raises(LayoutError, match=r"up to 512, not 513.*--rank 512") as refused:
        convert_file(made.path, tmp_path / "out", to="vllm")
    assert refused.value.keys == (PATHS[0],)
    assert not (tmp_path / "out").exists()


def test_ranks_are_cut_on_request_alone_and_what_that_costs_is_told(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", rank=2, ranks={PATHS[0]: 6})
    report = convert_file(made.path, tmp_path / "out", to="vllm", rank=4)
    assert set(report.ranks) == {4}
    found = served(tmp_path / "out", "vllm")
    deltas = {key.split("/")[-1].rpartition(":")[2]: value for key, value in made.deltas.items()}
    want = deltas[PATHS[0]]
    sigma = np.linalg.svd(want, compute_uv=False)
    best = math.sqrt(float((sigma[4:] ** 2).sum() / (sigma**2).sum()))
    cut = next(each for each in report.normalised if each.target == PATHS[0])
    assert cut.error == pytest.approx(best, rel=1e-3)
    assert not cut.exact
    assert "cut" in cut.changes
    assert np.linalg.norm(found[PATHS[0]] - want) / np.linalg.norm(want) == pytest.approx(best, rel=1e-3)
    assert all(each.error == 0.0 for each in report.normalised if each.target != PATHS[0])


def base_for(folder: Path, *, bias: bool = False) -> Path:
    """A checkpoint with the weights that the factories' adapters change, two layers deep."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    tensors = {}
    for path, shape in make.LLAMA:
        tensors[f"{path}.weight"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if bias:
            tensors[f"{path}.bias"] = torch.from_numpy(rng.standard_normal(shape[0], dtype=np.float32))
    tensors["model.embed_tokens.weight"] = torch.from_numpy(rng.standard_normal((20, 16), dtype=np.float32))
    tensors["lm_head.weight"] = torch.from_numpy(rng.standard_normal((20, 16), dtype=np.float32))
    make.write_safetensors(folder / "model.safetensors", tensors, None)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}), "utf-8")
    return folder


def test_dora_becomes_lora_with_its_base(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", dora=True)
    with pytest.raises(UnsupportedKindError, match="--base"):
        convert_file(made.path, tmp_path / "out", to="vllm")
    base = base_for(tmp_path / "base")
    report = convert_file(made.path, tmp_path / "out", to="vllm", base=base)
    assert all("to lora" in each.changes for each in report.normalised)
    found = served(tmp_path / "out", "vllm")
    weights, _ = make.read_safetensors(base / "model.safetensors")
    adapter = lt.load(made.path)
    for target, module in adapter.modules.items():
        _, shape, data = weights[f"{target.path}.weight"]
        weight = torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy())
        change = weight.double() + module.scale * (
            module.factors["up"].load().double() @ module.factors["down"].load().double()
        )
        assert module.magnitude is not None
        norm = change.norm(dim=1)
        want = ((module.magnitude.load().double() / norm)[:, None] * change - weight.double()).numpy()
        told = next(each for each in report.normalised if each.target == target.path)
        error = float(np.linalg.norm(found[target.path] - want) / np.linalg.norm(want))
        # 99.9 % of the energy is kept, and the error said is the one there is.
        assert error <= math.sqrt(1e-3) + 1e-6
        assert error == pytest.approx(told.error, abs=2e-6)


def test_dora_at_a_rank_asked_for(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", dora=True)
    base = base_for(tmp_path / "base")
    report = convert_file(made.path, tmp_path / "out", to="sglang", base=base, rank=6)
    assert set(report.ranks) == {6}
    assert 0.0 < max(each.error for each in report.normalised) < 1.0
    assert not [each for each in report.normalised if each.exact]


def test_dora_whose_rank_is_to_be_cut_becomes_lora_where_the_program_knows_dora_too(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", dora=True, ranks={PATHS[0]: 7})
    with pytest.raises(UnsupportedKindError, match="--base"):
        convert_file(made.path, tmp_path / "out", to="mlx", rank=5)
    report = convert_file(made.path, tmp_path / "out", to="mlx", rank=5, base=base_for(tmp_path / "base"))
    assert report.ranks == {5: len(PATHS)}
    assert all("to lora" in each.changes for each in report.normalised)
    kept = convert_file(made.path, tmp_path / "kept", to="mlx", rank=7)
    assert {each.changes for each in kept.normalised} <= {("padded",), ("padded", "folded"), ("folded",)}
    assert not kept.conversions


def test_magnitudes_are_not_dropped_from_what_is_cut(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", dora=True, ranks={PATHS[0]: 7})
    with pytest.raises(OptionError, match="loratools resize") as refused:
        convert_file(made.path, tmp_path / "out", to="vllm", rank=5, drop=["magnitude"])
    assert refused.value.keys == (PATHS[0],)


def test_what_the_base_holds_alike_is_left_out(tmp_path: Path) -> None:
    base = base_for(tmp_path / "base")
    weights, _ = make.read_safetensors(base / "model.safetensors")
    embedding = torch.from_numpy(
        np.frombuffer(weights["model.embed_tokens.weight"][2], np.float32).reshape(20, 16).copy()
    )
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    made = make.peft(tmp_path / "in", embedding=True, extra={key: embedding})
    report = convert_file(made.path, tmp_path / "out", to="vllm", base=base)
    assert {entry.key: entry.detail for entry in report.ledger if entry.fate == "implied"} == {
        key: "the base holds it"
    }
    other = make.peft(tmp_path / "other", embedding=True, extra={key: embedding + 1})
    with pytest.raises(LayoutError, match="--full-weights") as refused:
        convert_file(other.path, tmp_path / "two", to="vllm", base=base)
    assert refused.value.keys == (key,)
    apart = tmp_path / "whole.safetensors"
    convert_file(other.path, tmp_path / "two", to="vllm", base=base, full_weights=apart)
    assert (
        make.read_safetensors(apart)[0]["model.embed_tokens.weight"][2] == (embedding + 1).numpy().tobytes()
    )


def test_magnitudes_may_be_dropped(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", dora=True)
    report = convert_file(made.path, tmp_path / "out", to="vllm", drop=["magnitude"])
    assert set(report.dropped) == {key for key in made.tensors if key.endswith("lora_magnitude_vector")}
    check(tmp_path / "out", "vllm", made)


WHOLE = {
    "base_model.model.lm_head.weight": torch.full((20, 16), 2.0),
    "base_model.model.model.layers.0.self_attn.q_proj.bias": torch.full((24,), 3.0),
}


def test_whole_tensors_are_refused_by_name_or_written_apart(tmp_path: Path) -> None:
    made = make.peft(
        tmp_path / "in", extra=WHOLE, config={"modules_to_save": ["lm_head"], "bias": "lora_only"}
    )
    with pytest.raises(LayoutError, match=r"vLLM.*--full-weights") as refused:
        convert_file(made.path, tmp_path / "out", to="vllm")
    assert set(refused.value.keys) == set(WHOLE)
    apart = tmp_path / "whole.safetensors"
    report = convert_file(made.path, tmp_path / "out", to="vllm", full_weights=apart)
    assert report.full_weights == str(apart)
    assert {entry.key: entry.into for entry in report.ledger if entry.fate == "apart"} == {
        key: (key.removeprefix("base_model.model."),) for key in WHOLE
    }
    assert not report.dropped
    tensors, _ = make.read_safetensors(apart)
    assert {key: data for key, (_, _, data) in tensors.items()} == {
        key.removeprefix("base_model.model."): tensor.numpy().tobytes() for key, tensor in WHOLE.items()
    }
    check(tmp_path / "out", "vllm", made)


@pytest.mark.parametrize("tie", [False, True])
def test_one_of_two_tied_weights_apart_is_said(tie: bool, tmp_path: Path) -> None:
    base = base_for(tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tie}), "utf-8")
    key = "base_model.model.model.embed_tokens.weight"
    config = {"modules_to_save": ["embed_tokens"]}
    made = make.peft(tmp_path / "in", extra={key: torch.full((20, 16), 2.0)}, config=config)
    apart = tmp_path / "whole.safetensors"
    report = convert_file(made.path, tmp_path / "out", to="vllm", base=base, full_weights=apart)
    assert any("tie_word_embeddings" in note for note in report.notes) is tie


def test_rows_and_biases_of_factors_are_added_to_the_base_s_own(tmp_path: Path) -> None:
    rows = torch.full((2, 16), 7.0)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    made = make.peft(
        tmp_path / "in",
        lora_bias=True,
        extra={key: rows},
        config={"trainable_token_indices": {"embed_tokens": [3, 11]}},
    )
    apart = tmp_path / "whole.safetensors"
    with pytest.raises(LayoutError, match="--base"):
        convert_file(made.path, tmp_path / "out", to="vllm", full_weights=apart)
    assert not apart.exists()
    base = base_for(tmp_path / "base", bias=True)
    report = convert_file(made.path, tmp_path / "out", to="vllm", full_weights=apart, base=base)
    assert not report.dropped
    found, _ = make.read_safetensors(apart)
    before, _ = make.read_safetensors(base / "model.safetensors")
    embedding = np.frombuffer(found["model.embed_tokens.weight"][2], np.float32).reshape(20, 16)
    was = np.frombuffer(before["model.embed_tokens.weight"][2], np.float32).reshape(20, 16)
    assert (embedding[[3, 11]] == 7.0).all()
    others = [row for row in range(20) if row not in (3, 11)]
    assert np.array_equal(embedding[others], was[others])
    for path in PATHS:
        bias = np.frombuffer(found[f"{path}.bias"][2], np.float32)
        own = np.frombuffer(before[f"{path}.bias"][2], np.float32)
        added = made.tensors[f"base_model.model.{path}.lora_B.bias"].numpy()
        assert np.allclose(bias, own + 2.0 * added, rtol=1e-6)


def test_a_failure_leaves_neither_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.ops import _prove

    def changed(*_: object) -> None:
        raise UnsupportedKindError("changed")

    made = make.peft(tmp_path / "in", extra=WHOLE)
    monkeypatch.setattr(_prove, "refuse_changes", changed)
    with pytest.raises(UnsupportedKindError):
        convert_file(made.path, tmp_path / "out", to="vllm", full_weights=tmp_path / "whole.safetensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in"]


def test_sglang_gets_the_partners_that_it_wants(tmp_path: Path) -> None:
    q = "model.layers.{}.self_attn.q_proj"
    gate = "model.layers.0.mlp.gate_proj"
    model = [(q.format(0), (24, 16)), (q.format(1), (24, 16)), (gate, (32, 16))]
    model.append(("model.layers.0.self_attn.v_proj", (8, 16)))
    made = make.peft(tmp_path / "in", model=model)
    report = convert_file(made.path, tmp_path / "out", to="sglang")
    added = {each.target for each in report.normalised if each.changes == ("added",)}
    # v as the other layer has it, up as gate.
    assert added == {"model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"}
    _, arrays = read(tmp_path / "out")
    assert arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (8, 4)
    assert arrays["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 16)
    check(tmp_path / "out", "sglang", made)
    assert report.error == 0.0


def test_partners_whose_shapes_nothing_tells_need_the_base(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", model=[(PATHS[0], dict(make.LLAMA)[PATHS[0]])])
    assert PATHS[0].endswith("q_proj")
    with pytest.raises(LayoutError, match="--base") as refused:
        convert_file(made.path, tmp_path / "out", to="sglang")
    assert refused.value.keys == (PATHS[1],)
    base = base_for(tmp_path / "base")
    convert_file(made.path, tmp_path / "out", to="sglang", base=base)
    _, arrays = read(tmp_path / "out")
    height = dict(make.LLAMA)[PATHS[1]][0]
    assert arrays[f"base_model.model.{PATHS[1]}.lora_B.weight"].shape == (height, 4)


def test_lorax_gets_a_target_in_every_layer(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", model=ATTENTION[-1:])
    base = base_for(tmp_path / "base")
    report = convert_file(made.path, tmp_path / "out", to="lorax", base=base)
    assert [each.target for each in report.normalised] == [PATHS[1]]
    check(tmp_path / "out", "lorax", made)
    # Without the base nobody knows how many layers there are after the last one adapted.
    assert not any("how many layers" in note for note in report.notes)
    unknown = lt.convert(made.path, tmp_path / "unknown", to="lorax")
    assert any("how many layers" in note for note in unknown.notes)


def test_lorax_has_no_place_for_an_embedding(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", embedding=True)
    with pytest.raises(LayoutError, match="embeddings' factors") as refused:
        convert_file(made.path, tmp_path / "out", to="lorax")
    assert all("embed_tokens" in key for key in refused.value.keys)
    report = convert_file(made.path, tmp_path / "out", to="lorax", drop=["unnamed"])
    assert set(report.dropped) == set(refused.value.keys)


@pytest.mark.parametrize(
    "field", [{"init_lora_weights": "pissa"}, {"layer_replication": [[0, 1], [0, 2]]}, {"use_qalora": True}]
)
def test_what_a_configuration_alone_changes_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", config=field)
    with pytest.raises(UnsupportedKindError, match="vLLM") as refused:
        convert_file(made.path, tmp_path / "out", to="vllm")
    assert refused.value.keys == tuple(field)


def test_a_regular_expression_becomes_a_list(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", config={"target_modules": ".*(q|v)_proj"})
    convert_file(made.path, tmp_path / "out", to="sglang")
    assert read(tmp_path / "out")[0]["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_other_kinds_become_lora_exactly(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", kind="adalora")
    report = convert_file(made.path, tmp_path / "out", to="vllm")
    assert report.kinds == {"lora": len(PATHS)}
    before = make.deltas_of(lt.load(made.path))
    make.assert_close(make.deltas_of(lt.load(tmp_path / "out")), before, 1e-6)


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", dtype=torch.float16, alphas={PATHS[0]: 3e12})
    with pytest.raises(lt.LoraError, match="do not fit F16"):
        convert_file(made.path, tmp_path / "out", to="vllm")
    convert_file(made.path, tmp_path / "out", to="vllm", dtype="float32")
    check(tmp_path / "out", "vllm", made, 1e-6)


def test_peft_is_never_brought_into_a_normal_form(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", ranks={PATHS[0]: 7}, config={"use_rslora": True})
    report = convert_file(made.path, tmp_path / "out", to="peft")
    assert not report.runtime
    assert report.ranks == {4: len(PATHS) - 1, 7: 1}
    with pytest.raises(OptionError, match="peft is a layout"):
        convert_file(made.path, tmp_path / "again", to="peft", bucket=True)


def test_the_file_apart_is_not_the_output(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", extra=WHOLE)
    for name in ("out/x.safetensors", "out", "whole.bin"):
        with pytest.raises(OptionError, match="--full-weights"):
            convert_file(made.path, tmp_path / "out", to="vllm", full_weights=tmp_path / name)


def test_the_command_tells_what_was_done(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in", extra=WHOLE, ranks={PATHS[0]: 7})
    arguments = ("convert", made.path, "--to", "vllm", "--rank-bucket")
    apart = ("--full-weights", tmp_path / "whole.safetensors")
    text = invoke(*arguments, "-o", tmp_path / "one", *apart)
    assert text.exit_code == 0, text.stderr
    assert "padded" in text.stdout
    assert "whole.safetensors" in text.stdout
    said = invoke(*arguments, "-o", tmp_path / "two", "--json", "--overwrite", *apart)
    document = json.loads(said.stdout)
    assert document["runtime"] == "vllm"
    assert document["ranks"] == {"8": len(PATHS)}
    assert {each["target"] for each in document["normalised"]} == set(PATHS)
    assert document["full_weights"] == str(tmp_path / "whole.safetensors")


@pytest.mark.parametrize("option", [("--rank-bucket",), ("--full-weights", "x.safetensors"), ("--rank", "4")])
def test_options_of_programs_are_wrong_usage_for_a_layout(option: tuple[str, ...], tmp_path: Path) -> None:
    made = make.peft(tmp_path / "in")
    result = invoke("convert", made.path, "-o", tmp_path / "out", "--to", "peft", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


@pytest.mark.parametrize("program", [*SERVING, "llama.cpp", "mlx"])
def test_an_adapter_of_an_image_model_is_refused(program: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "in.safetensors")
    output = tmp_path / ("out.gguf" if program == "llama.cpp" else "out")
    with pytest.raises(ArchitectureError, match=r"runs language (and speech )?models"):
        convert_file(made.path, output, to=program)
    assert not output.exists()


def test_llama_cpp_gets_lora_at_each_module_s_own_rank(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    made = make.peft(
        tmp_path / "in", ranks={PATHS[2]: 7}, alphas={PATHS[2]: 3.0}, config={"use_rslora": True}
    )
    base = base_for(tmp_path / "base")
    shapes = ("--base", base, "--heads", "1", "--kv-heads", "1")
    result = invoke("convert", made.path, "-o", tmp_path / "out.gguf", "--to", "llama.cpp", *shapes, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["runtime"], report["layout"]) == ("llama.cpp", "gguf")
    assert report["ranks"] == {"4": len(PATHS) - 1, "7": 1}
    assert report["verified"]["error"] <= 1e-6
    dora = make.peft(tmp_path / "dora", dora=True)
    result = invoke("convert", dora.path, "-o", tmp_path / "two.gguf", "--to", "llama.cpp", *shapes, "--json")
    assert result.exit_code == 0, result.stderr
    assert {each["kind"] for each in json.loads(result.stdout)["conversions"]} == {"dora"}
