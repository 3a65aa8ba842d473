"""MLX's layout: read and written, to mlx-lm's conventions and to the reference results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import ArchitectureError, LayoutError
from loratools.ops.convert import convert_file

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference results are not there")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return found


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    tensors, _ = make.read_safetensors(folder / "adapters.safetensors")
    return {key: np.frombuffer(data, np.float32).reshape(shape) for key, (_, shape, data) in tensors.items()}


def base_with(folder: Path, **config: Any) -> Path:
    """A model's folder with its configuration alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), "utf-8")
    return folder


@pytest.fixture
def peft(tmp_path: Path) -> make.Made:
    return make.peft(tmp_path / "peft", rank=4, alpha=6.0, config={"base_model_name_or_path": "org/model"})


def test_factors_are_transposed_and_the_scale_stated(peft: make.Made, tmp_path: Path) -> None:
    report = convert_file(peft.path, tmp_path / "mlx", to="mlx")
    assert report.error == 0.0
    assert report.runtime == "mlx"
    assert not report.normalised
    arrays = arrays_of(tmp_path / "mlx")
    for path, _ in make.LLAMA:
        down = peft.tensors[f"base_model.model.{path}.lora_A.weight"].numpy()
        up = peft.tensors[f"base_model.model.{path}.lora_B.weight"].numpy()
        assert np.array_equal(arrays[f"{path}.lora_a"], down.T)
        assert np.array_equal(arrays[f"{path}.lora_b"], up.T)
    assert len(arrays) == 2 * len(make.LLAMA)
    assert config_of(tmp_path / "mlx") == {
        "fine_tune_type": "lora",
        "model": "org/model",
        "num_layers": -1,
        "lora_parameters": {
            "rank": 4,
            "scale": 1.5,
            "dropout": 0.0,
            "keys": ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"],
        },
    }


def test_there_and_back_gives_the_same_factors(peft: make.Made, tmp_path: Path) -> None:
    convert_file(peft.path, tmp_path / "mlx", to="mlx")
    report = convert_file(tmp_path / "mlx", tmp_path / "back", to="peft")
    assert report.error == 0.0
    back, _ = make.read_safetensors(tmp_path / "back" / "adapter_model.safetensors")
    assert {key: data for key, (_, _, data) in back.items()} == {
        key: tensor.numpy().tobytes() for key, tensor in peft.tensors.items()
    }


def test_ranks_and_scales_become_one(tmp_path: Path) -> None:
    paths = [path for path, _ in make.LLAMA]
    made = make.peft(tmp_path / "peft", ranks={paths[0]: 7}, alphas={paths[1]: 3.0, paths[2]: 16.0})
    report = convert_file(made.path, tmp_path / "mlx", to="mlx")
    assert report.ranks == {7: len(paths)}
    assert {each.target: each.changes for each in report.normalised} == {
        paths[0]: ("folded",),
        paths[1]: ("padded", "folded"),
        paths[2]: ("padded", "folded"),
        paths[3]: ("padded",),
        paths[4]: ("padded",),
    }
    # A ratio of a power of two rounds nothing.
    assert {each.target for each in report.normalised if each.exact} == set(paths[2:])
    assert config_of(tmp_path / "mlx")["lora_parameters"]["rank"] == 7
    make.assert_close(make.deltas_of(lt.load(tmp_path / "mlx")), made.deltas, 1e-6)


def test_layers_are_counted_from_the_end_of_the_base(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "peft", model=make.LLAMA[-1:])
    base = base_with(tmp_path / "base", num_hidden_layers=5)
    convert_file(made.path, tmp_path / "mlx", to="mlx", base=base)
    assert make.LLAMA[-1][0].startswith("model.layers.1.")
    assert config_of(tmp_path / "mlx")["num_layers"] == 4


def test_a_quantised_base_is_named(peft: make.Made, tmp_path: Path) -> None:
    said = {"group_size": 64, "bits": 4}
    base = base_with(tmp_path / "base", num_hidden_layers=2, quantization=said)
    convert_file(peft.path, tmp_path / "mlx", to="mlx", base=base)
    assert config_of(tmp_path / "mlx")["quantization"] == said
    assert config_of(tmp_path / "mlx")["num_layers"] == 2


def test_an_embedding_is_one_when_it_is_read(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "peft", embedding=True)
    convert_file(made.path, tmp_path / "mlx", to="mlx")
    arrays = arrays_of(tmp_path / "mlx")
    assert arrays["model.embed_tokens.lora_a"].shape == (20, 4)
    assert arrays["model.embed_tokens.lora_b"].shape == (4, 16)
    assert "model.embed_tokens" in config_of(tmp_path / "mlx")["lora_parameters"]["keys"]
    report = convert_file(tmp_path / "mlx", tmp_path / "back", to="peft")
    assert report.error == 0.0
    back, _ = make.read_safetensors(tmp_path / "back" / "adapter_model.safetensors")
    assert set(back) == set(made.tensors)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "peft", dora=True)
    report = convert_file(made.path, tmp_path / "mlx", to="mlx")
    assert report.error == 0.0
    assert config_of(tmp_path / "mlx")["fine_tune_type"] == "dora"
    arrays = arrays_of(tmp_path / "mlx")
    path = make.LLAMA[0][0]
    expected = made.tensors[f"base_model.model.{path}.lora_magnitude_vector"].numpy()
    assert np.array_equal(arrays[f"{path}.m"], expected)
    assert convert_file(tmp_path / "mlx", tmp_path / "back", to="peft").error == 0.0


def test_a_magnitude_of_an_embedding_runs_along_its_words(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "peft", dora=True, embedding=True)
    convert_file(made.path, tmp_path / "mlx", to="mlx", drop=["magnitude"])
    tensors, _ = make.read_safetensors(tmp_path / "mlx" / "adapters.safetensors")
    assert not any(key.endswith(".m") for key in tensors)
    arrays = {key: torch.from_numpy(values.copy()) for key, values in arrays_of(tmp_path / "mlx").items()}
    arrays["model.embed_tokens.m"] = torch.ones(20)
    make.write_safetensors(tmp_path / "mlx" / "adapters.safetensors", arrays, None)
    module = next(each for each in lt.load(tmp_path / "mlx").modules.values() if each.op == "embedding")
    assert module.magnitude_axis == "in"
    with pytest.raises(LayoutError, match="magnitude per input"):
        convert_file(tmp_path / "mlx", tmp_path / "back", to="peft")


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        ("transformer.h.1.attn.c_attn", "model.h.1.attn.c_attn"),
        ("transformer.h.0.mlp.c_proj", "model.h.0.mlp.c_proj"),
        ("gpt_neox.layers.1.attention.query_key_value", "model.h.1.attention.query_key_value"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", "model.h.0.mlp.dense_h_to_4h"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_families_that_mlx_lm_names_otherwise(theirs: str, own: str, tmp_path: Path) -> None:
    turned = {"fan_in_fan_out": True} if "transformer" in theirs else {}
    made = make.peft(tmp_path / "peft", model=[(theirs, (8, 6))], config=turned)
    convert_file(made.path, tmp_path / "mlx", to="mlx")
    assert set(arrays_of(tmp_path / "mlx")) == {f"{own}.lora_a", f"{own}.lora_b"}
    assert [target.path for target in lt.load(tmp_path / "mlx").modules] == [theirs]


def test_stacked_experts_stay_as_they_are(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.switch_mlp.gate_proj"
    rng = np.random.default_rng(0)
    tensors = {
        f"{path}.lora_a": torch.from_numpy(rng.standard_normal((3, 2, 6), dtype=np.float32)),
        f"{path}.lora_b": torch.from_numpy(rng.standard_normal((3, 8, 2), dtype=np.float32)),
    }
    folder = tmp_path / "in"
    folder.mkdir()
    make.write_safetensors(folder / "adapters.safetensors", tensors, None)
    said = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(said), "utf-8")
    report = convert_file(folder, tmp_path / "out", to="mlx", dtype="float32")
    assert report.error == 0.0
    arrays = arrays_of(tmp_path / "out")
    assert {key: values.tolist() for key, values in arrays.items()} == {
        key: tensor.tolist() for key, tensor in tensors.items()
    }


def test_what_mlx_has_no_parameters_for_is_refused_by_name(tmp_path: Path) -> None:
    biased = make.peft(tmp_path / "biased", lora_bias=True)
    with pytest.raises(LayoutError, match=r"bias.*--full-weights FILE --base BASE") as refused:
        convert_file(biased.path, tmp_path / "mlx", to="mlx")
    assert set(refused.value.keys) == {key for key in biased.tensors if key.endswith("lora_B.bias")}
    image = make.kohya(tmp_path / "image.safetensors")
    with pytest.raises(ArchitectureError, match=r"MLX .* runs language models"):
        convert_file(image.path, tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "mlx").exists()


def reference(case: str) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    folder = ORACLE / case / "expected" / "mlx_adapter"
    return ORACLE / case, arrays_of(folder), config_of(folder)


@oracle
@pytest.mark.parametrize("case", ["mlx__llama_dora", "mlx__llama_embedding"])
def test_as_the_reference_has_it(case: str, tmp_path: Path) -> None:
    folder, expected, config = reference(case)
    report = convert_file(
        folder / "input" / "adapter", tmp_path / "mlx", to="mlx", base=folder / "input" / "base"
    )
    arrays = arrays_of(tmp_path / "mlx")
    assert set(arrays) == set(expected)
    for key, values in expected.items():
        assert np.allclose(arrays[key], values, rtol=1e-6, atol=1e-7), key
    found = config_of(tmp_path / "mlx")
    assert found["fine_tune_type"] == config["fine_tune_type"]
    assert found["num_layers"] == config["num_layers"]
    for field in ("rank", "scale"):
        assert found["lora_parameters"][field] == config["lora_parameters"][field]
    assert found["lora_parameters"]["keys"] == sorted(config["lora_parameters"]["keys"])
    # Embeddings that PEFT saves beside their factors are the base's own.
    beside = {entry.key for entry in report.ledger if entry.fate == "implied"}
    assert all(key.endswith("base_layer.weight") for key in beside)
    assert not report.dropped


@oracle
@pytest.mark.parametrize("case", ["mlx__llama_dora", "mlx__llama_embedding"])
def test_the_reference_is_read_as_peft_s_own(case: str) -> None:
    folder = ORACLE / case
    ours = lt.load(folder / "expected" / "mlx_adapter")
    theirs = lt.load(folder / "input" / "adapter")
    assert set(ours.modules) == set(theirs.modules)
    for target, module in theirs.modules.items():
        other = ours.modules[target]
        assert (other.op, other.scale, other.rank) == (module.op, module.scale, module.rank)
        for role, ref in module.factors.items():
            assert torch.allclose(other.factors[role].load(), ref.load())


@oracle
def test_base_copies_are_refused_where_nothing_tells_that_they_are_the_base_s(tmp_path: Path) -> None:
    folder = ORACLE / "mlx__llama_embedding" / "input" / "adapter"
    with pytest.raises(LayoutError, match="--base") as refused:
        convert_file(folder, tmp_path / "mlx", to="mlx")
    assert all(key.endswith("base_layer.weight") for key in refused.value.keys)
