"""PEFT loads what every merge method writes, and computes the ΔW that the file states.

GPT-2 has layers that hold their weights transposed, Gemma has grouped attention. Their adapters are made by PEFT on
models of the real classes at tiny widths; a real adapter, of GPT-Neo, comes from the reference data.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.methods import get, methods
from loratools.ops.merge import merge_files

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NAMES = sorted(methods())
# Those that declare no law add factors, which have to be of one rank.
ON_DELTA = [name for name in NAMES if get(name).laws]
_NEO = "peft-lora/SARAELSAFTY__Movies-_with_lora/model"
_GPT2 = "loralib-like/umarsahmad__vl-fastapi-app/lora_weights.pt"
_NUMBERS = "loralib-like/0xSingletOnly__learn-lora/lora_weights.pth"
WEIGHTS = [0.8, 0.5]


def _gpt2() -> Any:
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def _gemma() -> Any:
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **heads))


MODELS = {
    "gpt2": (_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gemma": (_gemma, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}),
}


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A base model, and a folder with adapters "a" and "b" of other ranks, and "c" of a's rank, as PEFT saves them."""
    build, config = MODELS[request.param]
    torch.manual_seed(0)
    base, folder = build(), tmp_path_factory.mktemp(request.param)
    for seed, (name, rank, rslora) in enumerate([("a", 3, False), ("b", 2, True), ("c", 3, True)]):
        torch.manual_seed(seed)
        wanted = {"r": rank, "lora_alpha": 5, "use_rslora": rslora, "init_lora_weights": False, **config}
        made = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**wanted))
        made.save_pretrained(str(folder / name))
    return base, folder


def assert_loads(base: Any, adapter: Path) -> None:
    """PEFT finds every key that it looks for, no other, and the same ΔW as loratools."""
    expected = make.deltas_of(lt.load(adapter))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(adapter))
    report = peft.set_peft_model_state_dict(loaded, peft.utils.load_peft_weights(str(adapter), "cpu"))
    assert not report.unexpected_keys
    found = {}
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").double()
            wide = delta.T if getattr(module, "fan_in_fan_out", False) else delta
            found[f"language_model/{name}"] = wide.detach().numpy()
    make.assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_folder_is_loaded_by_peft(name: str, trained: tuple[Any, Path], tmp_path: Path) -> None:
    base, folder = trained
    inputs = [folder / "a", folder / ("b" if name in ON_DELTA else "c")]
    merge_files(inputs, tmp_path / "merged", method=name, weights=[0.7, -0.4])
    assert_loads(base, tmp_path / "merged")


def _neo_layers(shared: Path, folder: Path) -> tuple[Any, list[Path]]:
    """GPT-Neo of one layer, and a real adapter's first and third layers as two adapters of it."""
    source = shared / "corpus" / _NEO
    tensors = load_file(source / "Copy of adapter_model.safetensors")
    paths = [folder / str(layer) for layer in (0, 2)]
    for path in paths:
        part = f".h.{path.name}."
        kept = {name.replace(part, ".h.0."): each for name, each in tensors.items() if part in name}
        assert len(kept) == 4
        path.mkdir()
        save_file(kept, path / "adapter_model.safetensors", {"format": "pt"})
        shutil.copy(source / "adapter_config.json", path)
    sizes = {"vocab_size": 16, "hidden_size": 768, "intermediate_size": 8, "num_heads": 12}
    config = transformers.GPTNeoConfig(**sizes, num_layers=1, attention_types=[[["global"], 1]])
    return transformers.GPTNeoForCausalLM(config), paths


def _layers(source: Path, folder: Path, *prefixes: str) -> list[Path]:
    """Layers of one file, each as a file of its own that speaks of the first."""
    tensors = torch.load(source, map_location="cpu", weights_only=True)
    paths = [folder / f"{number}.pt" for number in range(len(prefixes))]
    for path, prefix in zip(paths, prefixes, strict=True):
        kept = {
            prefixes[0] + name.removeprefix(prefix): tensors[name]
            for name in tensors
            if name.startswith(prefix)
        }
        assert kept
        torch.save(kept, path)
    return paths


def _gpt2_layers(shared: Path, folder: Path) -> tuple[Any, list[Path]]:
    """GPT-2 of one layer, and the first two layers of an adapter that somebody's own code made of it."""
    paths = _layers(shared / "corpus" / _GPT2, folder, "transformer.h.0.", "transformer.h.1.")
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 384, "n_layer": 1, "n_head": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), paths


REAL = {"gpt-neo": _neo_layers, "gpt-2": _gpt2_layers}


@pytest.fixture(scope="module", params=REAL)
def real(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, list[Path]]:
    """A base model of one layer, and two real adapters of it."""
    return REAL[request.param](shared, tmp_path_factory.mktemp(request.param))


def assert_something_is_left(adapter: Path) -> None:
    norms = [np.linalg.norm(delta) for delta in make.deltas_of(lt.load(adapter)).values()]
    # model-stock leaves nothing of a weight whose changes point away from each other.
    assert np.isfinite(norms).all()
    assert max(norms) > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_real_adapter_merged_is_loaded_by_peft(
    name: str, real: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    base, inputs = real
    report = merge_files(inputs, tmp_path / "merged", method=name, weights=WEIGHTS, layout="peft")
    assert_loads(base, tmp_path / "merged")
    assert 0.0 < report.energy <= 1.0 + 1e-9
    assert_something_is_left(tmp_path / "merged")


@pytest.fixture(scope="module", params=["gpt-2", "numbers"])
def home_made(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two adapters in a layout of its maker's own, of which one names its modules by numbers alone."""
    folder = tmp_path_factory.mktemp(f"own-{request.param}")
    if request.param == "gpt-2":
        return _gpt2_layers(shared, folder)[1]
    return _layers(shared / "corpus" / _NUMBERS, folder, "0.", "1.")


@pytest.mark.parametrize("name", NAMES)
def test_a_home_made_layout_is_written_as_it_came(name: str, home_made: list[Path], tmp_path: Path) -> None:
    """In its orientation, with what the merge into PEFT's layout holds."""
    merge_files(home_made, tmp_path / "m.safetensors", method=name, weights=WEIGHTS)
    merge_files(home_made, tmp_path / "peft", method=name, weights=WEIGHTS, layout="peft")
    # A module for the factors alone (c_attn.lora.lora_A) is read, and left out of the names that are written.
    came = {
        key.replace(".lora.", "."): tensor
        for key, tensor in torch.load(home_made[0], map_location="cpu", weights_only=True).items()
    }
    own = load_file(tmp_path / "m.safetensors")
    assert own.keys() == came.keys()
    turned = lt.load(home_made[0]).layout.variant == "transposed"
    for key, tensor in own.items():
        # The other axis of each factor is the rank.
        base = 0 if key.endswith("lora_A") == turned else 1
        assert tensor.shape[base] == came[key].shape[base], key
    expected = make.deltas_of(lt.load(tmp_path / "peft"))
    make.assert_close(make.deltas_of(lt.load(tmp_path / "m.safetensors")), expected, 1e-5)
    assert_something_is_left(tmp_path / "m.safetensors")
