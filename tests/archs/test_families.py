"""What the model of an adapter is called: by PEFT's configuration, by the base's name, by the modules' names."""

from __future__ import annotations

import json
from pathlib import Path

import factories as make
import pytest

from loratools.archs._families import FAMILIES, family
from loratools.ops import files
from loratools.ops.inspect import describe
from tests.cli.running import invoke

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NAMES = SHARED / "names"
shared = pytest.mark.skipif(not NAMES.is_dir(), reason="the tables of module names are not there")

# By table of names, what all of its modules say, and what the usual targets (q and v) alone say.
BY_NAMES = {
    "bert": ("BERT", "BERT"),
    "distilbert": ("DistilBERT", "DistilBERT"),
    "roberta": ("RoBERTa", "RoBERTa"),
    "esm2": ("ESM", "ESM"),
    "gpt2": ("GPT-2", "GPT-2"),
    "gpt_neox": ("GPT-NeoX", "GPT-NeoX"),
    "mixtral": ("Mixtral", ""),
    "opt": ("OPT", "OPT"),
    "t5": ("T5", "T5"),
    "flan_t5": ("T5", "T5"),
    "vit": ("ViT", "ViT"),
    "wav2vec2": ("wav2vec 2.0", "wav2vec 2.0"),
    "wav2vec2_mms": ("wav2vec 2.0", "wav2vec 2.0"),
    "whisper": ("Whisper", ""),
    "clip": ("CLIP", ""),
    # Their names are those of many.
    "bloom": ("", ""),
    "falcon": ("", ""),
    "llama": ("", ""),
    "qwen3": ("", ""),
}
_ATTENTION = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "q", "v", "c_attn", "query_key_value")


def paths(table: str) -> list[str]:
    """The module paths of a table of names, the first component's."""
    content = json.loads((NAMES / f"{table}.json").read_text("utf-8"))
    return [row["native"] for part in content["components"].values() for row in part["modules"]]


@shared
@pytest.mark.parametrize("table", BY_NAMES)
def test_the_names_alone(table: str) -> None:
    whole, usual = BY_NAMES[table]
    known = paths(table)
    attention = [path for path in known if path.rpartition(".")[2] in _ATTENTION]
    assert family("llm", {}, known) == whole
    assert attention
    assert family("llm", {}, attention) == usual


@pytest.mark.parametrize(
    ("base", "path", "title"),
    [
        ("openai/whisper-base", "model.decoder.layers.0.self_attn.q_proj", "Whisper"),
        ("facebook/mms-1b-all", "wav2vec2.encoder.layers.0.attention.q_proj", "MMS (wav2vec 2.0)"),
        ("facebook/wav2vec2-base-960h", "wav2vec2.encoder.layers.0.attention.q_proj", "wav2vec 2.0"),
        ("openai/clip-vit-large-patch14", "vision_model.encoder.layers.0.self_attn.q_proj", "CLIP"),
        ("google/vit-base-patch16-224", "vit.encoder.layer.0.attention.attention.query", "ViT"),
        ("xlm-roberta-base", "roberta.encoder.layer.0.attention.self.query", "XLM-RoBERTa"),
        ("google-bert/bert-base-uncased", "bert.encoder.layer.0.attention.self.query", "BERT"),
        ("google/flan-t5-xl", "encoder.block.0.layer.0.SelfAttention.q", "T5"),
        ("EleutherAI/pythia-1b", "gpt_neox.layers.0.attention.query_key_value", "GPT-NeoX"),
        ("bigscience/bloomz-560m", "transformer.h.0.self_attention.query_key_value", "BLOOM"),
        ("tiiuae/falcon-7b", "transformer.h.0.self_attention.query_key_value", "Falcon"),
        ("facebook/opt-350m", "model.decoder.layers.0.self_attn.q_proj", "OPT"),
        ("facebook/esm2_t6_8M_UR50D", "esm.encoder.layer.0.attention.self.query", "ESM"),
        ("meta-llama/Llama-3.1-8B", "model.layers.0.self_attn.q_proj", "Llama"),
        ("mistralai/Mistral-7B-v0.1", "model.layers.0.self_attn.q_proj", "Mistral"),
        # The folder says something, and the names something else.
        ("/data/bert/run-1/t5", "gpt_neox.layers.0.attention.query_key_value", "GPT-NeoX"),
        ("/opt/models/mine", "model.layers.0.self_attn.q_proj", ""),
        ("adoption/optimal", "model.layers.0.self_attn.q_proj", ""),
    ],
)
def test_the_base_models_name(base: str, path: str, title: str) -> None:
    assert family("llm", {"base_model_name_or_path": base}, [path]) == title


@pytest.mark.parametrize(
    ("name", "base", "title"),
    [
        ("WhisperForConditionalGeneration", "mine/fine", "Whisper"),
        ("Wav2Vec2ForCTC", "facebook/mms-300m", "MMS (wav2vec 2.0)"),
        ("ViTForImageClassification", "some/clip-like", "ViT"),
        ("MyOwnModel", "gpt2", "GPT-2"),
    ],
)
def test_the_class_that_peft_noted(name: str, base: str, title: str) -> None:
    config = {
        "auto_mapping": {"base_model_class": name, "parent_library": "x"},
        "base_model_name_or_path": base,
    }
    assert family("unknown", config, []) == title


def test_image_models_have_none() -> None:
    assert family("sdxl", {"base_model_name_or_path": "llama"}, ["transformer.h.0.attn.c_attn"]) == ""


def test_no_family_claims_what_another_one_means() -> None:
    titles = [each.title for each in FAMILIES]
    assert len(titles) == len(set(titles))
    words = [word for each in FAMILIES for word in each.words]
    assert len(words) == len(set(words))
    markers = [marker for each in FAMILIES for marker in each.markers]
    assert len(markers) == len(set(markers))


CORPUS = SHARED / "corpus"
IN_CORPUS = {
    "openai/whisper-base": "Whisper",
    "roberta-base": "RoBERTa",
    "nateraw/vit-age-classifier": "ViT",
    "EleutherAI/gpt-neo-125M": "GPT-Neo",
    "PY007/TinyLlama-1.1B-intermediate-step-480k-1T": "Llama",
}


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not there")
@pytest.mark.parametrize("base", IN_CORPUS)
def test_adapters_of_the_corpus(base: str) -> None:
    configs = [path for path in CORPUS.rglob("adapter_config.json") if base in path.read_text("utf-8")]
    assert configs
    adapter = files.read(configs[0].parent)
    assert describe(adapter, norms=False).family == IN_CORPUS[base]


def test_info_shows_it(tmp_path: Path) -> None:
    fields = {"base_model_name_or_path": "org/Qwen3-0.6B"}
    path = make.peft(tmp_path / "a", config=fields).path
    assert json.loads(invoke("info", path, "--json").stdout)["family"] == "Qwen"
    shown = invoke("info", path, "--no-norms").stdout.splitlines()
    assert any("language model" in line and "Qwen" in line for line in shown)
