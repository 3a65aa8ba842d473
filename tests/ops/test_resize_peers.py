"""PEFT loads what a resize wrote, and its model computes with the ΔW that were meant."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import loratools as lt
from loratools.ops.resize import resize_file

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
TOKENS = torch.tensor([[1, 5, 9, 2, 30, 17]])


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["alpha", "rslora"])
def trained(tmp_path_factory, request):
    """A folder that PEFT wrote, of two ranks and alphas."""
    config = peft.LoraConfig(
        r=8,
        lora_alpha=12,
        target_modules=TARGETS,
        rank_pattern={"layers.1.self_attn.q_proj": 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        use_rslora=request.param,
        init_lora_weights=False,
    )
    folder = tmp_path_factory.mktemp("trained")
    peft.get_peft_model(model(), config).save_pretrained(folder)
    return folder


def truncated(delta, rank):
    u, sigma, vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * sigma[:rank]) @ vh[:rank])


def logits_of(whole):
    with torch.no_grad():
        return whole(TOKENS).logits


@pytest.mark.parametrize(
    "rule",
    [{"energy": 0.8}, {"error": 0.3}, {"ratio": 0.5}, {"size": 12_000}, {"rank": 3}, {"to_rank_of": "vllm"}],
    ids=str,
)
def test_peft_computes_with_the_reduced_differences(trained, tmp_path, rule):
    report = resize_file(trained, tmp_path / "out", **rule)
    ranks = {each.target: each.rank for each in report.modules}
    mixed = next(iter(rule)) in ("energy", "error", "ratio", "size")
    assert (len(set(ranks.values())) > 1) == mixed
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == mixed

    wanted = model()
    weights = dict(wanted.named_parameters())
    for target, module in lt.load(trained).modules.items():
        weight = weights[f"{target.path}.weight"]
        best = truncated(module.delta(), ranks[str(target)]).to(weight)
        # An embedding's weight has a row for each token, and its ΔW a column.
        weight.data += best.T if target.path.endswith("embed_tokens") else best

    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "out")
    got = {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in loaded.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert got == ranks
    torch.testing.assert_close(logits_of(loaded), logits_of(wanted), rtol=1e-4, atol=1e-5)
    assert float((logits_of(wanted) - logits_of(model())).abs().max()) > 1e-2
