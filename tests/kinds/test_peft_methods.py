"""PEFT's methods other than LoRA, against PEFT itself: ΔW, what is baked, what becomes LoRA, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import LayoutError, ShapeError, UnsupportedKindError
from loratools.ops import convert

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.peers

MIXED = ["q_proj", "k_proj", "down_proj"]
MODULES = 6


class Case(NamedTuple):
    """A model adapted by one method.

    Attributes:
        kind: As we call it.
        base: The model's folder.
        adapter: PEFT's folder.
        merged: The weights that PEFT merges, by name.
    """

    kind: str
    base: Path
    adapter: Path
    merged: dict[str, torch.Tensor]

    @property
    def changes(self) -> dict[str, torch.Tensor]:
        """What PEFT's merge changes, in float64, by the weight's name."""
        before = load_file(self.base / "model.safetensors")
        found = {key: self.merged[key].double() - tensor.double() for key, tensor in before.items()}
        return {key: change for key, change in found.items() if change.any()}


METHODS: dict[str, tuple[str, Callable[[], Any]]] = {
    "vera": ("vera", lambda: peft.VeraConfig(r=4, target_modules=MIXED)),
    "vera-drawn": (
        "vera",
        lambda: peft.VeraConfig(r=4, target_modules=MIXED, save_projection=False, projection_prng_key=7),
    ),
    "miss": ("miss", lambda: peft.MissConfig(r=6, target_modules=MIXED)),
    "miss-odd": ("miss", lambda: peft.MissConfig(r=5, target_modules=MIXED)),
    "miss-mini": (
        "miss",
        lambda: peft.MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=MIXED),
    ),
    "miss-bat": ("miss", lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=MIXED)),
    "vblora": (
        "vblora",
        lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=8, topk=3, target_modules=MIXED),
    ),
    "vblora-topk": (
        "vblora",
        lambda: peft.VBLoRAConfig(
            r=4, num_vectors=20, vector_length=8, topk=3, target_modules=MIXED, save_only_topk_weights=True
        ),
    ),
    "unilora": (
        "unilora",
        lambda: peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=MIXED, save_indices=True),
    ),
    "loha": (
        "loha",
        lambda: peft.LoHaConfig(r=3, alpha=5, alpha_pattern={"k_proj": 2}, target_modules=MIXED),
    ),
    "lokr": ("lokr", lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=MIXED)),
    "lokr-whole": ("lokr", lambda: peft.LoKrConfig(r=32, alpha=16, target_modules=MIXED)),
    "oft": ("oft", lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=MIXED)),
    "oft-cayley": (
        "oft",
        lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=MIXED),
    ),
    "ia3": ("ia3", lambda: peft.IA3Config(target_modules=MIXED, feedforward_modules=["down_proj"])),
    "adalora": (
        "adalora",
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=MIXED),
    ),
}


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Cases by name, each trained once."""
    made: dict[str, Case] = {}
    base = tmp_path_factory.mktemp("llama") / "base"
    llama().save_pretrained(base)

    def case(name: str) -> Case:
        if name not in made:
            kind, config = METHODS[name]
            adapter = base.parent / name
            model = peft.get_peft_model(llama(), config())
            _train(model)
            model.save_pretrained(adapter)
            merged = {key: tensor.clone() for key, tensor in model.merge_and_unload().state_dict().items()}
            made[name] = Case(kind, base, adapter, merged)
        return made[name]

    return case


def _train(model: Any) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Rotations are a series that holds for small angles alone.
                parameter.add_(torch.randn_like(parameter), alpha=0.02 if "oft_" in name else 0.1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_baked_weights_are_those_that_peft_merges(name: str, cases, tmp_path: Path) -> None:
    case = cases(name)
    lt.bake(case.base, [case.adapter], tmp_path / "baked")
    baked, before = (
        load_file(tmp_path / "baked" / "model.safetensors"),
        load_file(case.base / "model.safetensors"),
    )
    assert len(case.changes) == MODULES
    for key, old in before.items():
        change = case.changes.get(key)
        if change is None:
            assert torch.equal(baked[key], old)
        else:
            assert error(baked[key].double() - old.double(), change) < 2e-5, key
    assert lt.verify(case.base, [case.adapter], tmp_path / "baked").ok


@pytest.mark.parametrize("name", METHODS)
def test_as_lora_is_the_change_that_peft_merges(name: str, cases, tmp_path: Path) -> None:
    case = cases(name)
    report = lt.convert(case.adapter, tmp_path / "whole", to="peft", as_kind="lora", base=case.base)
    assert {each.exact for each in report.conversions} == {True}
    assert max(each.error for each in report.conversions) < 1e-6
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "whole").merge_and_unload().state_dict()
    before = load_file(case.base / "model.safetensors")
    for key, change in case.changes.items():
        assert error(loaded[key].double() - before[key].double(), change) < 2e-5, key


@pytest.mark.parametrize("name", ["vera", "miss-bat", "vblora", "ia3"])
def test_a_truncated_lora_says_its_error(name: str, cases, tmp_path: Path) -> None:
    case = cases(name)
    options: dict[str, Any] = {"to": "peft", "as_kind": "lora", "base": case.base, "rank": 2}
    report = lt.convert(case.adapter, tmp_path / "small", **options)
    said = {each.target: each.error for each in report.conversions}
    assert len(said) == MODULES
    for target, module in lt.load(tmp_path / "small").modules.items():
        change = case.changes[f"{target.path}.weight"]
        sigma = torch.linalg.svdvals(change)
        best = float(sigma[2:].norm() / sigma.norm())
        assert error(module.delta(), change) == pytest.approx(best, abs=1e-5)
        assert said[str(target)] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_is_written_again_as_it_was(name: str, cases, tmp_path: Path) -> None:
    case = cases(name)
    if case.kind != "ia3":  # which is called by its name, and is no adapter to load
        lt.save(lt.load(case.adapter), tmp_path / "saved")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert _content(tmp_path / "saved" / file) == _content(case.adapter / file)
    report = lt.convert(case.adapter, tmp_path / "spelt", to="peft")
    assert not report.dropped
    before, after = weights_of(case.adapter), weights_of(tmp_path / "spelt")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def _content(path: Path) -> object:
    return json.loads(path.read_text("utf-8")) if path.suffix == ".json" else path.read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_spelt_anew_is_what_peft_loads(name: str, cases, tmp_path: Path) -> None:
    case = cases(name)
    lt.convert(case.adapter, tmp_path / "half", to="peft", dtype="bfloat16")
    # PEFT unpacks stored top-k weights in float32 alone.
    lt.convert(case.adapter, tmp_path / "spelt", to="peft", dtype="float32" if "topk" in name else "float64")
    assert {t.dtype for t in weights_of(tmp_path / "half").values() if t.is_floating_point()} == {
        torch.bfloat16
    }
    found, wanted = (
        peft.PeftModel.from_pretrained(llama(), folder).merge_and_unload().state_dict()
        for folder in (tmp_path / "spelt", case.adapter)
    )
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_shared_tensors_are_no_extras_and_are_every_modules_own(cases) -> None:
    for name, roles in (
        ("vera", {"vera_a", "vera_b"}),
        ("vblora", {"vblora_bank"}),
        ("vblora-topk", {"vblora_bank"}),
        ("unilora", {"unilora_theta"}),
    ):
        adapter = lt.load(cases(name).adapter)
        assert not adapter.extras
        assert lt.info(cases(name).adapter).tensors == len(weights_of(cases(name).adapter))
        assert adapter.kinds == {cases(name).kind: MODULES}
        assert all(roles <= module.factors.keys() for module in adapter.modules.values())


@pytest.mark.parametrize("name", ["loha", "lokr-whole"])
def test_a_folded_scale_is_stated_as_one(name: str, cases, tmp_path: Path) -> None:
    """By LoHa's alpha_pattern, and over the configuration's rank where a LoKr's factors have none."""
    case = cases(name)
    lt.convert(case.adapter, tmp_path / "folded", to="peft", fold=True)
    assert {module.scale for module in lt.load(tmp_path / "folded").modules.values()} == {1.0}
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "folded").merge_and_unload().state_dict()
    before = load_file(case.base / "model.safetensors")
    for key, change in case.changes.items():
        assert error(merged[key].double() - before[key].double(), change) < 2e-5, key


def test_adalora_after_pruning(cases, tmp_path: Path) -> None:
    """Pruned modules are cut, but still divided by the rank that training began with."""
    model = peft.get_peft_model(llama(), METHODS["adalora"][1]())
    _train(model)
    stems = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_E")]
    kept = {f"{name}.lora_E": [True, number % 2 == 0, True, False] for number, name in enumerate(stems)}
    model.peft_config["default"].rank_pattern = kept
    model.save_pretrained(tmp_path / "pruned")
    adapter = lt.load(tmp_path / "pruned")
    assert {module.rank for module in adapter.modules.values()} == {2, 3}
    before = load_file(cases("adalora").base / "model.safetensors")
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "pruned").merge_and_unload().state_dict()
    lt.convert(tmp_path / "pruned", tmp_path / "spelt", to="peft")
    for written in (adapter, lt.load(tmp_path / "spelt")):
        for target, module in written.modules.items():
            key = f"{target.path}.weight"
            assert error(module.delta(), merged[key].double() - before[key].double()) < 2e-5


def test_kinds_that_need_a_base_say_so(cases, tmp_path: Path) -> None:
    for name in ("vera", "vera-drawn", "miss", "oft"):
        with pytest.raises(UnsupportedKindError, match="need --base"):
            lt.convert(cases(name).adapter, tmp_path / "out", to="peft", as_kind="lora")


def test_vera_of_modules_of_one_shape_needs_no_base(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.VeraConfig(r=4, target_modules=["down_proj"]))
    _train(model)
    model.save_pretrained(tmp_path / "vera")
    adapter = lt.load(tmp_path / "vera")
    assert "all are taken to have 48" in adapter.notes[0]
    before = llama().state_dict()
    merged = model.merge_and_unload().state_dict()
    for target, module in adapter.modules.items():
        key = f"{target.path}.weight"
        assert error(module.delta(), merged[key].double() - before[key].double()) < 2e-5


def test_a_bare_vector_of_unilora_is_kept_and_named(cases, tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=MIXED))
    model.save_pretrained(tmp_path / "bare")
    adapter = lt.load(tmp_path / "bare")
    assert "save_indices=True" in adapter.notes[0]
    lt.save(adapter, tmp_path / "again")
    assert weights_of(tmp_path / "again").keys() == {"base_model.unilora_theta_d"}
    with pytest.raises(UnsupportedKindError, match="save_indices=True"):
        lt.convert(tmp_path / "bare", tmp_path / "out", to="peft", as_kind="lora")
    with pytest.raises(UnsupportedKindError, match="save_indices=True"):
        lt.bake(cases("unilora").base, [tmp_path / "bare"], tmp_path / "baked")


def _spoilt(case: Case, folder: Path, key: str, tensor: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({**weights_of(case.adapter), key: tensor}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((case.adapter / "adapter_config.json").read_bytes())
    return folder


_STEM = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILS = {
    "vera": ("base_model.vera_A", torch.ones(4, 20)),
    "miss": (f"{_STEM}.miss_block", torch.ones(6, 20)),
    "miss-bat": (f"{_STEM}.miss_block", torch.ones(4, 8, 7)),
    "unilora": (f"{_STEM}.unilora_indices_A", torch.full((4, 32), 64)),
    "vblora-topk": ("base_model.vblora_vector_bank", torch.ones(2, 8)),
}


@pytest.mark.parametrize("name", SPOILS)
def test_tensors_that_do_not_fit_are_refused(name: str, cases, tmp_path: Path) -> None:
    folder = _spoilt(cases(name), tmp_path / "spoilt", *SPOILS[name])
    with pytest.raises(ShapeError, match=r"self_attn|mlp"):
        lt.convert(folder, tmp_path / "out", to="peft", as_kind="lora", base=cases(name).base)
    with pytest.raises(ShapeError):
        lt.bake(cases(name).base, [folder], tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_methods_are_not_mixed_in_a_folder(cases) -> None:
    vera, miss = (lt.load(cases(name).adapter) for name in ("vera", "miss"))
    both = dict(list(vera.modules.items())[:1]) | dict(list(miss.modules.items())[1:2])
    mixed = lt.Adapter(both, config=vera.config, layout=vera.layout, arch=vera.arch)
    with pytest.raises(LayoutError, match="miss"):
        convert.convert(mixed, "peft")
