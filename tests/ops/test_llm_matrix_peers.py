"""Adapters of every configuration of PEFT, in the forms of other programs and back: the logits stay as PEFT has them.

Other files hold what bakes and merges of single features do, and how mlx-lm and llama.cpp run what is written for them;
here are the ways between layouts, and configurations of mixtures of experts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools.ops.convert import convert_file

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.peers

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
# DoRA has its strength inside its norm where it is baked, as PEFT has it: alike at a weight of 1.
WEIGHTS = (1.0, -0.5)
_TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, **_HEADS))


def _tied() -> Any:
    config = transformers.LlamaConfig(**_TEXT, **_HEADS, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**_TEXT, **_HEADS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_TEXT, **_HEADS, **experts))


def _whisper() -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "vocab_size": 32}
    more = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24}
    lengths = {"decoder_ffn_dim": 24, "max_source_positions": 8, "max_target_positions": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **more, **lengths, **ends)
    return transformers.WhisperForConditionalGeneration(config)


def _bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=32, max_position_embeddings=16)
    return transformers.BertForTokenClassification(config)


class Model(NamedTuple):
    """A model of transformers, and what of it is adapted.

    Attributes:
        make: The model with random weights.
        targets: Two kinds of its linear layers, of which some have other ranks.
        saved: What is trained whole.
        layouts: Those that have names for it, beside PEFT's.
    """

    make: Callable[[], Any]
    targets: tuple[str, str]
    saved: str
    layouts: tuple[str, ...]


MODELS: Mapping[str, Model] = {
    "llama": Model(
        _llama, ("q_proj", "down_proj"), "lm_head", ("mlx", "gguf", "vllm", "sglang", "torchtune")
    ),
    "tied": Model(_tied, ("k_proj", "up_proj"), "embed_tokens", ("mlx", "gguf", "vllm")),
    "gpt2": Model(_gpt2, ("c_attn", "mlp.c_proj"), "ln_f", ("mlx", "gguf", "vllm", "loralib")),
    "mixtral": Model(_mixtral, ("q_proj", "v_proj"), "lm_head", ("mlx", "gguf", "vllm")),
    "qwen3_moe": Model(_qwen3_moe, ("q_proj", "o_proj"), "lm_head", ("mlx", "gguf", "vllm")),
    "whisper": Model(_whisper, ("q_proj", "fc1"), "layer_norm", ("vllm",)),
    "bert": Model(_bert, ("query", "output.dense"), "classifier", ("gguf", "vllm", "loralib")),
}
EXPERTS = ("mixtral", "qwen3_moe")


def _parts(model: Model) -> dict[str, dict[str, Any]]:
    """Configurations that every layout holds once ranks and scales are made one."""
    first, second = model.targets
    return {
        "plain": {},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {first: 2}, "alpha_pattern": {second: 5}, "use_rslora": True},
    }


class Base:
    """A model on disk, and in memory."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        torch.manual_seed(3)
        self.model = MODELS[name].make().eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.2)
        self.model.save_pretrained(folder)

    def trained(self, folder: Path, seed: int = 1, **options: Any) -> torch.Tensor:
        """An adapter as if trained, saved by PEFT; returns the logits with it."""
        said = {"r": 4, "lora_alpha": 6, "target_modules": [*MODELS[self.name].targets], **options}
        model = peft.get_peft_model(copy.deepcopy(self.model), peft.LoraConfig(**said)).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" in key:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT has no connection to look names of models up with
            model.save_pretrained(folder)
        return self.logits(model.base_model.model)

    def under_peft(self, folder: Path) -> torch.Tensor:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
        return self.logits(model.base_model.model)

    def baked(self, out: Path, *adapters: Path, weights: tuple[float, ...] | None = None) -> torch.Tensor:
        lt.bake(self.folder, list(adapters), out, weights=weights)
        return self.logits(type(self.model).from_pretrained(out, dtype=torch.float32).eval())

    def logits(self, model: Any) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": TOKENS}
        if self.name == "whisper":
            sound = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
            inputs = {"input_features": sound, "decoder_input_ids": TOKENS}
        with torch.no_grad():
            found: torch.Tensor = model(**inputs).logits
        return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Each model once."""
    made: dict[str, Base] = {}

    def base(name: str) -> Base:
        if name not in made:
            made[name] = Base(name, tmp_path_factory.mktemp(name))
        return made[name]

    return base


def alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


WAYS = [(name, part, to) for name, model in MODELS.items() for part in _parts(model) for to in model.layouts]


@pytest.mark.parametrize(("name", "part", "to"), WAYS, ids=["-".join(way) for way in WAYS])
def test_there_and_back(name: str, part: str, to: str, bases: Any, tmp_path: Path) -> None:
    base = bases(name)
    wanted = base.trained(tmp_path / "adapter", **_parts(MODELS[name])[part])
    assert (wanted - base.logits(base.model)).abs().max() > 0.01
    there = tmp_path / ("there.gguf" if to == "gguf" else "there.safetensors" if to == "loralib" else "there")
    convert_file(tmp_path / "adapter", there, to=to, base=base.folder)
    convert_file(there, tmp_path / "back", to="peft", base=base.folder)
    alike(base.under_peft(tmp_path / "back"), wanted)
    alike(base.baked(tmp_path / "baked", there), wanted)


# A tied model cannot hold what PEFT does with a copy of its embedding alone; bakes untie it.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied"])
def test_what_vllm_cannot_hold_is_written_apart(name: str, bases: Any, tmp_path: Path) -> None:
    base = bases(name)
    base.trained(tmp_path / "adapter", modules_to_save=[MODELS[name].saved])
    whole = tmp_path / "whole.safetensors"
    convert_file(tmp_path / "adapter", tmp_path / "vllm", to="vllm", base=base.folder, full_weights=whole)
    with torch.no_grad():
        changed = copy.deepcopy(base.model)
        missing, unknown = changed.load_state_dict(load_file(whole), strict=False)
        assert len(missing) < len(changed.state_dict())
        assert not unknown
        model = peft.PeftModel.from_pretrained(changed, tmp_path / "vllm").eval()
    alike(base.logits(model.base_model.model), base.under_peft(tmp_path / "adapter"))


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("part", ["rslora", "patterns", "saved", "dora"])
def test_experts_beside_every_configuration(name: str, part: str, bases: Any, tmp_path: Path) -> None:
    base = bases(name)
    options: dict[str, Any] = {"saved": {"modules_to_save": ["lm_head"]}, "dora": {"use_dora": True}}.get(
        part, _parts(MODELS[name]).get(part, {})
    )
    if part != "dora":  # which PEFT does not have for parameters
        options = {**options, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    first = base.trained(tmp_path / "first", **options)
    base.trained(tmp_path / "second", seed=2, r=2)
    alike(base.baked(tmp_path / "baked", tmp_path / "first"), first)
    more = {"rank": 16} if part == "dora" else {}
    merged = lt.merge(
        [lt.load(tmp_path / "first"), lt.load(tmp_path / "second")],
        weights=WEIGHTS,
        base=base.folder,
        full_modules="sum",
        **more,
    )
    lt.save(merged, tmp_path / "merged")
    wanted = base.baked(tmp_path / "both", tmp_path / "first", tmp_path / "second", weights=WEIGHTS)
    alike(base.under_peft(tmp_path / "merged"), wanted)
