"""Real models of transformers with adapters that PEFT saved: the same ΔW, the same logits, there and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import loratools as lt
from loratools.errors import LayoutError
from loratools.ops.bake import bake
from loratools.ops.convert import convert_file

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.peers

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "head_dim": 4,
}
_BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, attention_bias=True))


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA, tie_word_embeddings=True))


def _gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def _whisper() -> Any:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    lengths = {"max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 4}
    tokens = {
        "vocab_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    config = transformers.WhisperConfig(d_model=16, **heads, **layers, **lengths, **tokens)
    return transformers.WhisperForConditionalGeneration(config)


def _bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT))


def _t5() -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> Any:
    sizes = {key: value for key, value in _BERT.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def _logits(model: Any) -> torch.Tensor:
    name = model.config.model_type
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if name == "whisper":
        inputs = {
            "input_features": torch.randn(1, 4, 16, generator=generator),
            "decoder_input_ids": TOKENS[:, :4],
        }
    elif name == "vit":
        inputs = {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    elif name == "t5":
        inputs["decoder_input_ids"] = TOKENS[:, :3]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


class Model(NamedTuple):
    """A model of transformers, and what of it is adapted.

    Attributes:
        make: The model with random weights.
        targets: Two kinds of its linear layers.
        task: PEFT's name of what it does.
    """

    make: Callable[[], Any]
    targets: tuple[str, str]
    task: str


MODELS: Mapping[str, Model] = {
    "llama": Model(_llama, ("q_proj", "down_proj"), "CAUSAL_LM"),
    "qwen3": Model(_qwen3, ("k_proj", "gate_proj"), "CAUSAL_LM"),
    "gpt2": Model(_gpt2, ("c_attn", "c_proj"), "CAUSAL_LM"),
    "whisper": Model(_whisper, ("q_proj", "fc1"), "SEQ_2_SEQ_LM"),
    "bert": Model(_bert, ("query", "dense"), "SEQ_CLS"),
    "t5": Model(_t5, ("q", "wo"), "SEQ_2_SEQ_LM"),
    "vit": Model(_vit, ("q_proj", "fc1"), "FEATURE_EXTRACTION"),
}


def _parts(model: Model) -> dict[str, dict[str, Any]]:
    first, second = model.targets
    return {
        "plain": {},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {first: 2}, "alpha_pattern": {rf".*\.{second}": 5}},
        "rslora-patterns": {"use_rslora": True, "rank_pattern": {first: 2}, "alpha_pattern": {second: 5}},
        "dora": {"use_dora": True},
        "bias": {"bias": "lora_only"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "some-layers": {"target_modules": rf".*\.(0|block\.0)\..*\.?({first}|{second})"},
    }


CASES = [(name, part) for name, model in MODELS.items() for part in _parts(model)]
LLAMA_ONLY: Mapping[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [2, 7]},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "velora": {"velora_config": {"num_groups": 4}},
    "monteclora": {"monteclora_config": {"num_samples": 2, "buffer_size": 2}},
    "mica": {"init_lora_weights": "mica"},
    "blocks": {
        "use_bdlora": {
            "target_modules_bd_a": ["down_proj"],
            "target_modules_bd_b": ["q_proj"],
            "nblocks": 2,
        }
    },
    "kasa": {"kasa_config": {}},
}


class Trained(NamedTuple):
    """An adapter in PEFT, and where it and its base lie."""

    base: Path
    adapter: Path
    logits: torch.Tensor
    deltas: Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Any, Path]]]:
    """Each model once, and its folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def base(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(7)
            model, folder = MODELS[name].make(), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            if name == "vit":
                # save_pretrained writes the names of earlier releases, which PEFT does not see.
                save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
            made[name] = model, folder
        return made[name]

    yield base
    made.clear()


def _config(name: str, options: Mapping[str, Any]) -> Any:
    model = MODELS[name]
    said = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(model.targets),
        "task_type": model.task,
        **options,
    }
    configs = peft.tuners.lora.config
    kinds = {
        "velora_config": configs.VeloraConfig,
        "monteclora_config": configs.MontecloraConfig,
        "use_bdlora": configs.BdLoraConfig,
        "kasa_config": configs.KasaConfig,
    }
    said.update({field: kind(**said[field]) for field, kind in kinds.items() if field in said})
    if name == "vit":
        del said["task_type"]
    return peft.LoraConfig(**said)


def _trained(bases: Any, name: str, options: Mapping[str, Any], folder: Path) -> Trained:
    """An adapter as if trained, saved by PEFT."""
    model, base = bases(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), _config(name, options))
        torch.manual_seed(11)
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data += torch.randn_like(parameter) * 0.2
        wrapped.save_pretrained(folder)
    deltas = {}
    for path, layer in wrapped.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "scaling", {}):
            plain = not options.keys() & {"use_bdlora", "kasa_config", "use_dora"}
            if plain:
                delta = layer.get_delta_weight("default").detach()
                deltas[path] = delta.T if name == "gpt2" or path.endswith("embed_tokens") else delta
    return Trained(base, folder, _logits(wrapped.base_model.model), deltas)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def _is_as_trained(case: Trained, name: str, tmp_path: Path) -> None:
    """ΔW is PEFT's; a bake has the adapter's logits; a converted folder loads into PEFT and has them too."""
    adapter = lt.load(case.adapter)
    modules = {target.path: module for target, module in adapter.modules.items()}
    assert case.deltas.keys() <= modules.keys()
    for path, delta in case.deltas.items():
        _close(modules[path].delta(), delta)
    bake(case.base, [case.adapter], tmp_path / "baked")
    kind = type(MODELS[name].make())
    _close(_logits(kind.from_pretrained(tmp_path / "baked")), case.logits)
    convert_file(case.adapter, tmp_path / "again", to="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(kind.from_pretrained(case.base), tmp_path / "again")
    _close(_logits(loaded.base_model.model), case.logits)


@pytest.mark.parametrize(("name", "part"), CASES, ids=["-".join(case) for case in CASES])
def test_every_model(name: str, part: str, bases: Any, tmp_path: Path) -> None:
    options = _parts(MODELS[name])[part]
    _is_as_trained(_trained(bases, name, options, tmp_path / "adapter"), name, tmp_path)


def test_tied_embeddings(bases: Any, tmp_path: Path) -> None:
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    _is_as_trained(_trained(bases, "qwen3", options, tmp_path / "adapter"), "qwen3", tmp_path)


@pytest.mark.parametrize("part", LLAMA_ONLY)
def test_every_configuration(part: str, bases: Any, tmp_path: Path) -> None:
    _is_as_trained(_trained(bases, "llama", LLAMA_ONLY[part], tmp_path / "adapter"), "llama", tmp_path)


@pytest.mark.parametrize("part", ["plain", "rslora", "patterns", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["loralib", "mlx"])
def test_other_layouts_and_back(layout: str, name: str, part: str, bases: Any, tmp_path: Path) -> None:
    case = _trained(bases, name, _parts(MODELS[name])[part], tmp_path / "adapter")
    if layout == "loralib" and part == "dora":
        with pytest.raises(LayoutError, match="magnitude"):
            convert_file(case.adapter, tmp_path / "between.safetensors", to=layout)
        return
    between = tmp_path / ("between" if layout == "mlx" else "between.safetensors")
    convert_file(case.adapter, between, to=layout)
    convert_file(between, tmp_path / "back", to="peft")
    kind = type(MODELS[name].make())
    loaded = peft.PeftModel.from_pretrained(kind.from_pretrained(case.base), tmp_path / "back")
    _close(_logits(loaded.base_model.model), case.logits)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}}], ids=len
)
@pytest.mark.parametrize("rslora", [False, True])
def test_initial_factors(start: str, patterns: Any, rslora: bool, bases: Any, tmp_path: Path) -> None:
    model, base = bases("llama")
    config = _config("llama", {"init_lora_weights": start, "use_rslora": rslora, **patterns})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path / "initial")
    torch.manual_seed(13)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(tmp_path / "trained")
    convert_file(tmp_path / "trained", tmp_path / "plain", to="peft", initial=tmp_path / "initial")
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "plain")
    wanted = _logits(wrapped.base_model.model)
    _close(_logits(loaded.base_model.model), wanted)
    bake(base, [tmp_path / "plain"], tmp_path / "baked")
    _close(_logits(type(model).from_pretrained(tmp_path / "baked")), wanted)
