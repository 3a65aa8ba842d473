"""Adapters of tiny mixtures of experts, as transformers and PEFT run them: logits before and after everything we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratools as lt
from loratools.model import Adapter
from loratools.ops.convert import convert_file

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3, 11, 4]])
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, intermediate_size=20, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2
        )
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Case:
    """A tiny model on disk, and adapters that PEFT has saved for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        # Models of this size say nothing with the small weights that they begin with.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        self.base = folder / "base"
        model.save_pretrained(self.base)
        self.plain = logits(self.model())

    def model(self, folder: Path | None = None) -> torch.nn.Module:
        found: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder or self.base, dtype=torch.float32
        )
        return found.eval()

    def adapter(self, name: str, rank: int, seed: int, **config: Any) -> tuple[Path, torch.Tensor]:
        """An adapter on attention and experts, and the logits that it makes."""
        torch.manual_seed(seed)
        asked = peft.LoraConfig(
            r=rank,
            lora_alpha=3 * rank,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
            **config,
        )
        model = peft.get_peft_model(self.model(), asked).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(0, 0.4)
        path = self.folder / name
        model.save_pretrained(path)
        return path, logits(model)

    def under_peft(self, path: Path) -> torch.Tensor:
        return logits(peft.PeftModel.from_pretrained(self.model(), path).eval())

    def baked(self, *paths: Path, weights: list[float] | None = None) -> torch.Tensor:
        out = self.folder / "baked"
        lt.bake(self.base, [str(path) for path in paths], out, weights=weights, overwrite=True)
        return logits(self.model(out))


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def first(case: Case) -> tuple[Path, torch.Tensor]:
    return case.adapter("first", 2, 1)


def test_baked_in_every_style_is_what_peft_runs(case: Case, first: tuple[Path, torch.Tensor]) -> None:
    path, wanted = first
    assert (wanted - case.plain).abs().max() > 0.2
    alike(case.baked(path), wanted)
    split = case.folder / "split"
    convert_file(path, split, to="peft", experts="split", base=case.base, overwrite=True)
    assert lt.load(split).kinds.keys() == {"lora"}
    alike(case.baked(split), wanted)
    alike(case.baked(path, split, weights=[0.25, 0.75]), wanted)


def test_peft_runs_what_was_split_and_fused_again(case: Case, first: tuple[Path, torch.Tensor]) -> None:
    path, wanted = first
    split, fused = case.folder / "split_again", case.folder / "fused_again"
    convert_file(path, split, to="peft", experts="split", base=case.base)
    convert_file(split, fused, to="peft", experts="fused", base=case.base)
    alike(case.under_peft(fused), wanted)


def test_peft_runs_split_experts_of_families_that_it_converts(
    case: Case, first: tuple[Path, torch.Tensor]
) -> None:
    if case.name == "gpt_oss":
        pytest.skip("PEFT converts no single experts of gpt-oss")
    path, wanted = first
    split = case.folder / "split_for_peft"
    convert_file(path, split, to="peft", experts="split", base=case.base)
    alike(case.under_peft(split), wanted)


@pytest.mark.parametrize("layout", ["mlx", "gguf"])
def test_there_and_back_by_stacked_layouts(case: Case, first: tuple[Path, torch.Tensor], layout: str) -> None:
    if (case.name, layout) == ("gpt_oss", "gguf"):
        pytest.skip("llama.cpp's names for gpt-oss are not described")
    path, wanted = first
    there = case.folder / (layout if layout == "mlx" else "there.gguf")
    back = case.folder / f"back_{layout}"
    convert_file(path, there, to=layout, base=case.base)
    convert_file(there, back, to="peft", base=case.base)
    alike(case.under_peft(back), wanted)
    alike(case.baked(there), wanted)


def test_merges_are_sums_of_what_peft_runs(case: Case, first: tuple[Path, torch.Tensor]) -> None:
    path, _ = first
    other, _ = case.adapter("other", 3, 2, use_rslora=True)
    wanted = case.baked(path, other, weights=[0.7, -0.3])
    merged, _ = _merged(case, [path, other])
    alike(case.under_peft(merged), wanted)
    split = case.folder / "split_to_merge"
    convert_file(other, split, to="peft", experts="split", base=case.base)
    mixed, adapter = _merged(case, [path, split])
    assert adapter.kinds["experts"] == 4
    alike(case.under_peft(mixed), wanted)


def _merged(case: Case, paths: list[Path]) -> tuple[Path, Adapter]:
    merged = lt.merge([lt.load(path) for path in paths], weights=[0.7, -0.3], base=case.base)
    out = case.folder / "merged"
    lt.save(merged, out, overwrite=True)
    return out, merged


def test_resized_to_more_than_the_rank_changes_nothing(case: Case, first: tuple[Path, torch.Tensor]) -> None:
    path, wanted = first
    resized = lt.resize(lt.load(path), rank=4)
    out = case.folder / "resized"
    lt.save(resized, out)
    alike(case.under_peft(out), wanted)
    smaller = lt.resize(lt.load(path), rank=1)
    lt.save(smaller, case.folder / "smaller")
    cut = lt.load(case.folder / "smaller")
    assert {each.factors["down"].shape[0] for each in cut.modules.values()} == {1, 4}
