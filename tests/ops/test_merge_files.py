"""Merging to files: what is stored, what is carried, and what is refused before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import (
    ArchitectureError,
    LayoutError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedKindError,
)
from loratools.ops.merge import merge_files

LOSSLESS = ["linear", "concat"]


def test_keep_is_the_inputs_dtype_or_the_wider(pair, tmp_path: Path) -> None:
    half = make.kohya(tmp_path / "half.safetensors", "sdxl", dtype=torch.float16, seed=5)
    adapters = {name: lt.load(path) for name, path in (("f32", pair[0].path), ("f16", half.path))}

    def stored(*names: str) -> set[str]:
        merged = lt.merge([adapters[name] for name in names], weights=[0.5] * len(names))
        return {ref.dtype for module in merged.modules.values() for ref in module.factors.values()}

    assert stored("f16", "f16") == {"F16"}
    assert stored("f32", "f16") == {"F32"}


@pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_a_store_dtype_is_kept_to_even_for_carried_modules(dtype: str, name: str, pair) -> None:
    merged = lt.merge([lt.load(pair[0].path)], dtype=dtype)
    assert {ref.dtype for module in merged.modules.values() for ref in module.factors.values()} == {name}
    make.assert_close(make.deltas_of(merged), pair[0].deltas, make.TOLERANCE[name])


def test_a_merged_value_that_does_not_fit_is_refused(pair) -> None:
    one = lt.load(pair[0].path)
    with pytest.raises(NonFiniteError, match="do not fit F16"):
        lt.merge([one], weights=[1e9], dtype="float16")
    lt.merge([one], weights=[1e9], dtype="bfloat16")


def test_a_merge_is_balanced_enough_for_half_precision(tmp_path: Path) -> None:
    """ΔW of 1e-9 and 1e4 survive float16: neither factor carries it alone."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", only=["attn"])
    for weight in (1e-7, 1e5):
        merged = lt.merge([lt.load(made.path), lt.load(made.path)], weights=[weight, weight], dtype="float16")
        make.assert_close(make.deltas_of(merged), make.total((2 * weight, made.deltas)), 5e-3)


def test_the_same_inputs_give_the_same_bytes(pair, tmp_path: Path) -> None:
    for name in ("m", "n"):
        lt.save(
            lt.merge([lt.load(made.path) for made in pair], weights=[0.5, 0.5]),
            tmp_path / f"{name}.safetensors",
        )
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()


def test_inputs_are_not_changed(pair, tmp_path: Path) -> None:
    before = [make.digest(made.path) for made in pair]
    merge_files([made.path for made in pair], tmp_path / "m.safetensors", weights=[0.5, 2.0], method="ties")
    assert [make.digest(made.path) for made in pair] == before


def test_other_architectures_are_refused_with_both_names(tmp_path: Path) -> None:
    one, two = make.kohya(tmp_path / "a.safetensors", "sd15"), make.kohya(tmp_path / "b.safetensors", "sdxl")
    with pytest.raises(ArchitectureError, match=r"a\.safetensors: Stable Diffusion 1.*b\.safetensors: .*XL"):
        merge_files([one.path, two.path], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_shapes_that_disagree_are_named(tmp_path: Path) -> None:
    one = make.peft(tmp_path / "a")
    wide = tuple((path, (2 * shape[0], shape[1])) for path, shape in make.LLAMA)
    two = make.peft(tmp_path / "b", wide)
    with pytest.raises(ShapeError, match=r"q_proj: \[16, 16\] against \[32, 16\]") as caught:
        lt.merge([lt.load(one.path), lt.load(two.path)])
    assert len(caught.value.keys) == len(make.LLAMA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name_unless_allowed(bad: float, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if "lora_down" in key)
    made.tensors[name].view(-1)[1] = bad
    make.write_safetensors(made.path, made.tensors, None)
    other = make.kohya(tmp_path / "b.safetensors", "sdxl", seed=4)
    adapters = [lt.load(made.path), lt.load(other.path)]
    with pytest.raises(NonFiniteError, match="NaN or Inf") as caught:
        lt.merge(adapters, weights=[0.5, 0.5])
    assert caught.value.keys == (name,)
    assert caught.value.path == str(made.path)
    merged = lt.merge(adapters, weights=[0.5, 0.5], method="concat", allow_nonfinite=True)
    assert len(merged.modules) == len(made.deltas)
    finite = {key: d for key, d in make.deltas_of(merged).items() if np.isfinite(d).all()}
    assert len(finite) == len(made.deltas) - 1


def test_linear_goes_on_with_nan_where_it_is_allowed(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if "lora_down" in key)
    made.tensors[name].view(-1)[1] = float("nan")
    make.write_safetensors(made.path, made.tensors, None)
    other = make.kohya(tmp_path / "b.safetensors", "sdxl", seed=4)
    merged = lt.merge([lt.load(made.path), lt.load(other.path)], allow_nonfinite=True)
    assert len(merged.modules) == len(made.deltas)


@pytest.mark.parametrize("dora", ["out", "in"])
def test_dora_is_refused_by_name(dora: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", dora=dora)
    with pytest.raises(UnsupportedKindError, match="DoRA"):
        lt.merge([lt.load(made.path), lt.load(made.path)])


@pytest.mark.parametrize(
    ("kind", "title"),
    [("loha", "LoHa"), ("lokr", "LoKr"), ("oft", "OFT"), ("glora", "GLoRA"), ("full", "full difference")],
)
def test_other_kinds_are_refused_by_name(kind: str, title: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind=kind)
    with pytest.raises(UnsupportedKindError, match=title):
        lt.merge([lt.load(made.path), lt.load(made.path)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1.0]}, "1 weights for 2"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, float("inf")]}, "finite"),
        ({"method": "liner"}, "linear"),
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"density": 0.5}, "density"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "quantum"}, "quantum"),
        ({"drop": ["modules"]}, "modules"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, match: str, pair) -> None:
    with pytest.raises(OptionError, match=match):
        lt.merge([lt.load(made.path) for made in pair], **options)


def test_nothing_to_merge() -> None:
    with pytest.raises(OptionError):
        lt.merge([])


def test_an_existing_output_is_refused_before_any_work(pair, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(lt.LoraError, match="exists"):
        merge_files([tmp_path / "missing.safetensors"], output)
    assert output.read_bytes() == b"mine"


def test_a_dry_run_says_the_size_and_writes_nothing(pair, tmp_path: Path) -> None:
    paths = [made.path for made in pair]
    planned = merge_files(paths, tmp_path / "m.safetensors", dry_run=True)
    assert not (tmp_path / "m.safetensors").exists()
    done = merge_files(paths, tmp_path / "m.safetensors")
    assert done.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert planned.bytes == done.bytes
    assert planned.estimate is not None
    assert planned.estimate.written == planned.bytes
    assert planned.estimate.tasks == len(planned.modules)
    assert done.estimate is None
    assert planned.modules == done.modules


def test_extras_that_agree_are_carried_and_others_refused(tmp_path: Path) -> None:
    key = "base_model.model.lm_head.weight"
    head = torch.ones(3, 16)
    one = make.peft(tmp_path / "a", extra={key: head}, config={"modules_to_save": ["lm_head"]})
    same = make.peft(
        tmp_path / "b", seed=1, extra={key: head.clone()}, config={"modules_to_save": ["lm_head"]}
    )
    other = make.peft(tmp_path / "c", seed=2, extra={key: head * 2})
    merged = lt.merge([lt.load(one.path), lt.load(same.path)])
    lt.save(merged, tmp_path / "m")
    new, _ = make.read_safetensors(tmp_path / "m" / "adapter_model.safetensors")
    old, _ = make.read_safetensors(one.file)
    assert new[key] == old[key]
    assert lt.load(tmp_path / "m").config["modules_to_save"] == ["lm_head"]
    with pytest.raises(LayoutError, match="lm_head"):
        lt.merge([lt.load(one.path), lt.load(other.path)])
    dropped = lt.merge([lt.load(one.path), lt.load(other.path)], drop=["extras"])
    assert not dropped.extras


def test_dropped_modules_to_save_leave_the_configuration(tmp_path: Path) -> None:
    key = "base_model.model.lm_head.weight"
    one = make.peft(tmp_path / "a", extra={key: torch.ones(3, 16)}, config={"modules_to_save": ["lm_head"]})
    lt.save(lt.merge([lt.load(one.path)], weights=[0.5], drop=["extras"]), tmp_path / "m")
    assert not lt.load(tmp_path / "m").config.get("modules_to_save")


def test_biases_are_summed_with_their_scales(tmp_path: Path) -> None:
    one = make.peft(tmp_path / "a", lora_bias=True, rank=4, alpha=8)
    two = make.peft(tmp_path / "b", seed=1, lora_bias=True, rank=2, alpha=2)
    merged = make.saved(lt.merge([lt.load(one.path), lt.load(two.path)], weights=[0.5, -1]), tmp_path / "m")
    for target, module in merged.modules.items():
        key = f"base_model.model.{target.path}.lora_B.bias"
        want = 0.5 * 2.0 * one.tensors[key] - 1.0 * 1.0 * two.tensors[key]
        found = module.factors["up_bias"].load() * module.scale
        assert torch.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("field", ["bias", "trainable_token_indices"])
def test_the_configuration_speaks_of_what_was_carried_from_any_input(field: str, tmp_path: Path) -> None:
    """PEFT loads tensors beside the factors only where the configuration announces them."""
    key, value, default = {
        "bias": ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", "lora_only", "none"),
        "trainable_token_indices": (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            {"embed_tokens": [1, 2]},
            None,
        ),
    }[field]
    plain = make.peft(tmp_path / "a", config={field: default})
    other = make.peft(tmp_path / "b", seed=1, extra={key: torch.ones(2, 16)}, config={field: value})
    lt.save(lt.merge([lt.load(plain.path), lt.load(other.path)]), tmp_path / "m")
    again = lt.load(tmp_path / "m")
    assert list(again.extras) == [key]
    assert again.config[field] == value


def test_the_output_may_be_one_of_the_inputs(pair, tmp_path: Path) -> None:
    one, two = pair
    want = make.total((1.0, one.deltas), (0.5, two.deltas))
    merge_files([one.path, two.path], one.path, weights=[1.0, 0.5], overwrite=True)
    make.assert_close(make.deltas_of(lt.load(one.path)), want, 2e-6)


def test_a_failed_merge_leaves_an_existing_output_alone(pair, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(NonFiniteError):
        merge_files([made.path for made in pair], output, weights=[1e9, 1e9], dtype="float16", overwrite=True)
    assert output.read_bytes() == b"mine"


def test_no_warning_is_printed(tmp_path: Path) -> None:
    """Read-only memory is no fault of the user's: torch must not be made to warn of it."""
    arrays = {key: tensor.numpy() for key, tensor in make.mlx(tmp_path / "a").tensors.items()}
    np.savez(tmp_path / "adapters.npz", **arrays)
    kohya = make.kohya(tmp_path / "k.safetensors", "sdxl")
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import loratools as lt\n"
        f"for path in {[str(tmp_path / 'adapters.npz'), str(kohya.path)]!r}:\n"
        "    adapter = lt.load(path)\n"
        "    [module.delta() for module in adapter.modules.values()]\n"
        "    [ref.load() for module in adapter.modules.values() for _, ref in module.tensors()]\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_alpha_that_is_not_a_number_is_refused_by_name(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if key.endswith(".alpha"))
    made.tensors[name].fill_(float("nan"))
    make.write_safetensors(made.path, made.tensors, None)
    with pytest.raises(NonFiniteError, match="scale"):
        lt.merge([lt.load(made.path)], weights=[0.5])


def test_a_kind_that_cannot_be_merged_is_said_before_shapes_are_compared(tmp_path: Path) -> None:
    """Two inputs that differ in kind and shape: the kind is what the user has to know."""
    one = make.peft(tmp_path / "a")
    wide = {"base_model.model.model.layers.0.self_attn.q_proj": (64, 64)}
    stem = next(iter(wide))
    tensors = {f"{stem}.lokr_w1": torch.ones(8, 8), f"{stem}.lokr_w2": torch.ones(8, 8)}
    make.write_safetensors(tmp_path / "b.safetensors", tensors, None)
    with pytest.raises(UnsupportedKindError, match="LoKr"):
        lt.merge([lt.load(one.path), lt.load(tmp_path / "b.safetensors")])


@pytest.mark.parametrize(
    ("method", "options"), [("linear", {"rank": 3}), ("ties", {"density": 0.4, "rank": 5})]
)
def test_how_many_threads_there_are_changes_no_byte(
    method: str, options: dict[str, float], tmp_path: Path
) -> None:
    paths = [make.kohya(tmp_path / f"{seed}.safetensors", "sdxl", seed=seed).path for seed in (1, 2)]
    for threads in (1, 2, 5):
        merge_files(paths, tmp_path / f"m{threads}.safetensors", method=method, threads=threads, **options)
    first = (tmp_path / "m1.safetensors").read_bytes()
    assert all((tmp_path / f"m{threads}.safetensors").read_bytes() == first for threads in (2, 5))


def test_an_absent_inputs_full_weights_are_absent_too(tmp_path: Path) -> None:
    key = "base_model.model.lm_head.weight"
    one = make.peft(tmp_path / "a", extra={key: torch.ones(3, 16)}, config={"modules_to_save": ["lm_head"]})
    two = make.peft(tmp_path / "b", seed=1)
    adapters = [lt.load(one.path), lt.load(two.path)]
    absent = lt.merge(adapters, weights=[0, 1])
    assert not absent.extras
    lt.save(absent, tmp_path / "m")
    assert not lt.load(tmp_path / "m").config.get("modules_to_save")
    # Present at another weight it is carried whole, and that is said.
    half = lt.merge(adapters, weights=[0.5, 1])
    assert list(half.extras) == [key]
    assert any("carried whole" in note for note in half.notes)
    assert not any("carried whole" in note for note in lt.merge(adapters).notes)


def test_a_trained_scalar_multiplies_the_module(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    stem = next(key for key in made.tensors if key.endswith(".lora_up.weight")).removesuffix(
        ".lora_up.weight"
    )
    plain = {str(target): module for target, module in lt.load(made.path).modules.items()}
    make.write_safetensors(
        tmp_path / "b.safetensors", {**made.tensors, f"{stem}.scalar": torch.tensor(3.0)}, None
    )
    adapter = lt.load(tmp_path / "b.safetensors")
    scaled = [str(target) for target, module in adapter.modules.items() if "scalar" in module.factors]
    assert len(scaled) == 1
    norms = {module.target: module.norm for module in lt.info(tmp_path / "b.safetensors").modules}
    for target, module in lt.merge([adapter], weights=[1]).modules.items():
        expected = (3.0 if str(target) in scaled else 1.0) * plain[str(target)].delta()
        assert torch.allclose(module.delta(), expected, rtol=1e-5, atol=1e-6)
        assert norms[str(target)] == pytest.approx(float(expected.norm()), rel=1e-5)
        assert "scalar" not in module.factors


def test_values_that_float16_cannot_resolve_are_said(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    tiny = {key: tensor * (1e-7 if "lora_" in key else 1) for key, tensor in made.tensors.items()}
    make.write_safetensors(tmp_path / "b.safetensors", tiny, None)
    lossy = lt.merge([lt.load(tmp_path / "b.safetensors")], weights=[0.5], dtype="float16")
    assert any("float16" in note for note in lossy.notes)
    assert not any(
        "float16" in note for note in lt.merge([lt.load(made.path)], weights=[0.5], dtype="float16").notes
    )


def test_a_merged_kohya_file_states_one_alpha_whatever_the_ranks(tmp_path: Path) -> None:
    """Readers that apply the commonest alpha to all modules are then right, as are those that read each."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    other = make.kohya(tmp_path / "b.safetensors", "sdxl", seed=1, only=["text_model"])
    adapters = [lt.load(made.path), lt.load(other.path)]
    merged = make.saved(lt.merge(adapters, weights=[0.7, 0.6]), tmp_path / "m.safetensors")
    assert len({module.rank for module in merged.modules.values()}) > 1
    assert len({module.alpha for module in merged.modules.values()}) == 1
    assert merged.metadata["ss_network_alpha"] != "Dynamic"
    for target, module in merged.modules.items():
        expected = sum(
            weight * adapter.modules[target].delta()
            for weight, adapter in zip((0.7, 0.6), adapters, strict=True)
            if target in adapter.modules
        )
        assert torch.allclose(module.delta(), expected, rtol=1e-4, atol=1e-6)
    scaled = lt.merge(adapters, weights=[0.7, 0.6])
    assert not any("alpha of their own" in note for note in scaled.notes)
    # What goes over byte for byte keeps its alpha, and that is remarked on.
    assert any("alpha of their own" in note for note in lt.merge(adapters).notes)
