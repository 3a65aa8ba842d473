"""Comparisons through files, against naive float64 arithmetic on dense ΔW."""

from __future__ import annotations

import json
import math
from pathlib import Path

import factories as make
import numpy as np
import pytest
import scipy.linalg
import torch

import loratools as lt
from loratools.errors import (
    ArchitectureError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedKindError,
)
from loratools.io.reader import open_tensors
from loratools.ops.compare import DETAILED, compare


def matrices(deltas, scale=1.0):
    return {key: scale * delta.reshape(len(delta), -1) for key, delta in deltas.items()}


def side_by_side(one, other):
    """Both as one long vector over all weights, zeros where one lacks a weight."""
    keys = sorted(one.keys() | other.keys())
    shapes = {key: (one.get(key), other.get(key)) for key in keys}

    def flat(which):
        given = [
            pair[which] if pair[which] is not None else np.zeros_like(pair[1 - which])
            for pair in shapes.values()
        ]
        return np.concatenate([each.ravel() for each in given])

    return flat(0), flat(1)


def naive(one, other):
    """Cosine, norm ratio, distance and sign conflict as their definitions say."""
    a, b = side_by_side(one, other)
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    product = a * b
    return (
        a @ b / (sizes[0] * sizes[1]),
        sizes[1] / sizes[0],
        np.linalg.norm(a - b) / max(sizes),
        np.abs(product[product < 0]).sum() / np.abs(product).sum(),
    )


def space(matrix):
    u, sigma, vh = np.linalg.svd(matrix)
    rank = int((sigma > 1e-10 * sigma[0]).sum())
    return u[:, :rank], vh[:rank].T


def overlap_of(one, other):
    return float(np.mean(np.cos(scipy.linalg.subspace_angles(one, other)) ** 2))


def figures(relation):
    return relation.cosine, relation.ratio, relation.distance, relation.sign_conflict


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_two_adapters_against_dense_matrices(weights, pair):
    one, two = pair
    report = compare([one.path, lt.load(two.path)], weights=weights, modules=True, exact=True)
    dense = matrices(one.deltas, weights[0]), matrices(two.deltas, weights[1])
    (found,) = report.pairs
    assert figures(found.relation) == pytest.approx(naive(*dense), abs=1e-12)
    a, b = side_by_side(*dense)
    assert found.multiple == pytest.approx(a @ b / (a @ a), rel=1e-10)
    assert [each.norm for each in report.adapters] == pytest.approx([np.linalg.norm(a), np.linalg.norm(b)])
    components = {key.split("/")[0] for key in one.deltas}
    assert set(found.components) == components
    for name, relation in found.components.items():
        own = [{key: each for key, each in side.items() if key.startswith(name + "/")} for side in dense]
        assert figures(relation) == pytest.approx(naive(*own), abs=1e-12)
    assert report.sampled_rows == 0


def test_modules_against_dense_matrices(pair):
    one, two = pair
    dense = matrices(one.deltas), matrices(two.deltas)
    report = compare([one.path, two.path], modules=True, exact=True)
    (found,) = report.pairs
    assert {
        f"{each.component}/{each.target}" for each in found.modules
    } == one.deltas.keys() | two.deltas.keys()
    weighted = []
    for each in found.modules:
        key = f"{each.component}/{each.target}"
        if key not in two.deltas:
            assert each.relation == (None, 0.0, 1.0, None, None, None, None, None)
            assert each.ranks[1] == 0
            assert each.norms[1] == 0.0
            continue
        a, b = dense[0][key], dense[1][key]
        assert figures(each.relation) == pytest.approx(naive({key: a}, {key: b}), abs=1e-12)
        (ua, va), (ub, vb) = space(a), space(b)
        assert each.ranks == (ua.shape[1], ub.shape[1])
        assert each.relation.column_overlap == pytest.approx(overlap_of(ua, ub), abs=1e-10)
        assert each.relation.row_overlap == pytest.approx(overlap_of(va, vb), abs=1e-10)
        assert each.relation.column_chance == pytest.approx(max(each.ranks) / len(a))
        assert each.relation.row_chance == pytest.approx(max(each.ranks) / a.shape[1])
        angle = math.degrees(scipy.linalg.subspace_angles(ua, ub).min())
        assert each.column_angle == pytest.approx(angle, abs=1e-6)
        assert each.row_angle == pytest.approx(
            math.degrees(scipy.linalg.subspace_angles(va, vb).min()), abs=1e-6
        )
        weighted.append((each.norms[0] * each.norms[1], each.relation))
    total = sum(weight for weight, _ in weighted)
    for name in ("column_overlap", "row_overlap", "column_chance", "row_chance"):
        mean = sum(weight * getattr(relation, name) for weight, relation in weighted) / total
        assert getattr(found.relation, name) == pytest.approx(mean, rel=1e-10)


def test_what_one_lacks_is_named(pair):
    one, two = pair
    report = compare([one.path, two.path])
    lacking = {key.split("/", 1)[1] for key in one.deltas.keys() - two.deltas.keys()}
    assert lacking
    assert set(report.adapters[1].missing) == lacking
    assert report.adapters[0].missing == ()
    assert report.adapters[1].targets == len(two.deltas)
    assert report.pairs[0].shared == len(two.deltas)
    assert report.targets == len(one.deltas)


def test_the_order_matters_only_for_what_is_relative(pair):
    paths = [each.path for each in pair]
    (there,), (back,) = (compare(each, exact=True).pairs for each in (paths, paths[::-1]))
    assert back.relation.ratio == pytest.approx(1.0 / there.relation.ratio)
    for name in ("cosine", "distance", "column_overlap", "row_overlap", "sign_conflict"):
        assert getattr(back.relation, name) == pytest.approx(getattr(there.relation, name), abs=1e-12)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads, pair):
    paths = [each.path for each in pair]
    assert compare(paths, threads=threads, modules=True) == compare(paths, modules=True)


def test_a_sample_of_rows_comes_near_the_exact_conflict(tmp_path: Path):
    tensors = [
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(
                4, 96, generator=torch.Generator().manual_seed(seed)
            ),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(
                1024, 4, generator=torch.Generator().manual_seed(seed + 9)
            )
            + 0.5,
        }
        for seed in range(2)
    ]
    for number, each in enumerate(tensors):
        make.write_safetensors(tmp_path / f"{number}.safetensors", each, None)
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    sampled, exact = (compare(paths, exact=each) for each in (False, True))
    assert (sampled.sampled_rows, exact.sampled_rows) == (64, 0)
    near, true = (each.pairs[0].relation.sign_conflict for each in (sampled, exact))
    assert near != true
    assert near == pytest.approx(true, abs=0.05)
    assert sampled.pairs[0].relation[:-1] == exact.pairs[0].relation[:-1]


@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_two_spellings_of_one_adapter_are_the_same(dtype, tmp_path: Path):
    # Kohya has Flux's q, k and v in one module, diffusers has them apart.
    made = make.kohya(tmp_path / "fused.safetensors", "flux", alpha=3.0, only=["double", "single", "te1"])
    lt.save(lt.load(made.path), tmp_path / "apart.safetensors", layout="diffusers", dtype=dtype)
    for paths in (
        [made.path, tmp_path / "apart.safetensors"],
        [tmp_path / "apart.safetensors", made.path],
    ):
        report = compare(paths)
        (found,) = report.pairs
        assert found.verdict == "same"
        assert report.same == ((0, 1),)
        if dtype == "keep":
            assert found.relation.distance < 1e-6
        else:
            assert 1e-5 < found.relation.distance < found.tolerance


def test_an_adapter_and_itself_are_the_same_to_the_last_digits(pair):
    (found,) = compare([pair[0].path, pair[0].path], exact=True).pairs
    assert found.verdict == "same"
    assert found.relation.distance < 1e-13
    assert found.relation.cosine == pytest.approx(1.0, abs=1e-14)
    assert found.relation.column_overlap == pytest.approx(1.0, abs=1e-12)
    assert found.relation.sign_conflict < 1e-12


@pytest.mark.parametrize("weight", [0.25, -1.0, -3.0])
def test_a_multiple_is_told_from_another_adapter(weight, pair):
    report = compare([pair[0].path, pair[0].path], weights=[1.0, weight], exact=True)
    (found,) = report.pairs
    assert found.verdict == "scaled"
    assert found.multiple == pytest.approx(weight)
    assert found.relation.ratio == pytest.approx(abs(weight))
    assert report.same == ()
    if weight == -1.0:
        assert found.relation.distance == pytest.approx(2.0)
        assert found.relation.sign_conflict == pytest.approx(1.0)


def test_a_change_above_rounding_is_seen(pair):
    (found,) = compare([pair[0].path, pair[0].path], weights=[1.0, 1.0 + 1e-5]).pairs
    assert found.verdict == "scaled"
    assert found.relation.distance == pytest.approx(1e-5, rel=1e-3)


def test_a_weight_of_zero_has_no_direction(pair):
    report = compare([each.path for each in pair], weights=[1.0, 0.0], suggest=True)
    (found,) = report.pairs
    assert (found.verdict, found.relation.cosine) == ("zero", None)
    assert (found.relation.ratio, found.relation.distance) == (0.0, 1.0)
    assert found.relation.sign_conflict is None
    assert report.cosines[1] == (None, None)
    assert report.suggestion is None
    assert any("nothing to suggest" in note for note in report.notes)


def test_many_adapters_make_a_matrix(tmp_path: Path):
    count = DETAILED + 2
    made = [
        make.kohya(
            tmp_path / f"{seed}.safetensors",
            "sdxl",
            seed=seed % (count - 1),
            rank=1 + seed % 3 if seed < 3 else 2,
        )
        for seed in range(count - 1)
    ]
    paths = [each.path for each in made] + [made[4].path]
    deltas = [each.deltas for each in made] + [made[4].deltas]
    report = compare(paths, suggest=True)
    assert report.pairs == ()
    assert report.sampled_rows is None
    assert report.same == ((4, count - 1),)
    assert any("not computed for so many" in note for note in report.notes)
    for first in range(count):
        for second in range(count):
            wanted = naive(matrices(deltas[first]), matrices(deltas[second]))
            assert report.cosines[first][second] == pytest.approx(wanted[0], abs=1e-12)
            assert report.distances[first][second] == pytest.approx(wanted[2], abs=1e-12)
    assert report.suggestion is not None
    assert report.suggestion.weights[-1] == 0.0
    assert report.suggestion.figures["excess overlap"] is None
    with pytest.raises(OptionError, match="every module"):
        compare(paths, modules=True)


def test_few_and_many_give_the_same_matrix(pair, tmp_path: Path):
    paths = [each.path for each in pair]
    few, many = compare(paths), compare(paths * 9)
    np.testing.assert_allclose(np.array(many.cosines)[:2, :2], few.cosines, atol=1e-13)
    np.testing.assert_allclose(np.array(many.distances)[:2, :2], few.distances, atol=1e-13)


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_other_kinds_are_compared_by_their_change(kind, tmp_path: Path):
    one = make.kohya(tmp_path / "one.safetensors", "sdxl", seed=1)
    make.kohya(tmp_path / "two.safetensors", "sdxl", kind=kind, seed=2)
    other = lt.load(tmp_path / "two.safetensors")
    dense = matrices({key: each.reshape(len(each), -1) for key, each in one.deltas.items()})
    theirs = {
        make.key_of(target.component, str(target)): module.delta().double().numpy()
        for target, module in other.modules.items()
    }
    (found,) = compare([one.path, other], exact=True).pairs
    # Module.delta() is float32.
    assert figures(found.relation) == pytest.approx(naive(dense, matrices(theirs)), abs=1e-6)


def test_dora_needs_the_base_and_is_compared_with_it(tmp_path: Path):
    only = ["attn_proj", "mlp_0"]
    plain = make.kohya(tmp_path / "plain.safetensors", "flux", seed=1, only=only)
    make.kohya(tmp_path / "dora.safetensors", "flux", seed=2, dora="out", only=only)
    dora = lt.load(tmp_path / "dora.safetensors")
    with pytest.raises(UnsupportedKindError, match="DoRA") as caught:
        compare([plain.path, dora])
    assert set(caught.value.keys) == {str(target) for target in dora.modules}
    assert "--base" in str(caught.value)
    generator = torch.Generator().manual_seed(5)
    weights = {
        f"{target.path}.weight": torch.randn(module.shape, generator=generator)
        for target, module in dora.modules.items()
    }
    make.write_safetensors(tmp_path / "base.safetensors", weights, None)
    theirs = {
        make.key_of(target.component, str(target)): module.delta(weights[f"{target.path}.weight"])
        .double()
        .numpy()
        for target, module in dora.modules.items()
    }
    (found,) = compare([plain.path, dora], base=tmp_path / "base.safetensors", exact=True).pairs
    assert figures(found.relation) == pytest.approx(naive(matrices(plain.deltas), matrices(theirs)), abs=1e-6)


def test_components_narrow_the_comparison(pair):
    one, two = pair
    report = compare([one.path, two.path], components=["denoiser"], exact=True)
    own = [
        {key: each for key, each in matrices(made.deltas).items() if key.startswith("denoiser/")}
        for made in pair
    ]
    assert figures(report.pairs[0].relation) == pytest.approx(naive(*own), abs=1e-12)
    assert list(report.pairs[0].components) == ["denoiser"]
    with pytest.raises(OptionError, match="Did you mean: denoiser"):
        compare([one.path, two.path], components=["denoisr"])


def test_what_is_not_compared_is_said(tmp_path: Path):
    one = make.peft(tmp_path / "one", seed=1, lora_bias=True)
    two = make.peft(tmp_path / "two", seed=2)
    report = compare([one.path, two.path])
    assert any("biases of" in note for note in report.notes)


def test_adapters_without_a_weight_in_common_are_orthogonal_and_it_is_said(tmp_path: Path):
    one = make.kohya(tmp_path / "one.safetensors", "sdxl", only=["te1"])
    two = make.kohya(tmp_path / "two.safetensors", "sdxl", only=["unet"])
    report = compare([one.path, two.path])
    (found,) = report.pairs
    assert (found.shared, found.relation.cosine) == (0, 0.0)
    assert found.relation.column_overlap is found.relation.sign_conflict is None
    assert found.relation.distance == pytest.approx(
        math.hypot(*(each.norm for each in report.adapters)) / max(each.norm for each in report.adapters)
    )
    assert any("1 and 2 change no base weight in common" in note for note in report.notes)


def test_bad_input_is_refused(pair, tmp_path: Path):
    one, two = (each.path for each in pair)
    with pytest.raises(OptionError, match="Two adapters at least"):
        compare([one])
    with pytest.raises(OptionError, match="3 weights for 2 adapters"):
        compare([one, two], weights=[1.0, 1.0, 1.0])
    with pytest.raises(OptionError, match="not a finite number"):
        compare([one, two], weights=[1.0, math.inf])
    with pytest.raises(OptionError, match="cannot be used"):
        compare([one, two], device="abacus")
    other = make.kohya(tmp_path / "sd15.safetensors", "sd15")
    with pytest.raises(ArchitectureError, match="no weights in common"):
        compare([one, other.path])


def test_nan_is_refused_and_named(pair, tmp_path: Path):
    tensors = dict(pair[0].tensors)
    bad = sorted(key for key in tensors if "lora_up" in key)[:2]
    for key in bad:
        tensors[key] = torch.full_like(tensors[key], math.nan)
    make.write_safetensors(tmp_path / "bad.safetensors", tensors, None)
    with pytest.raises(NonFiniteError, match=r"bad\.safetensors: 2 tensors") as caught:
        compare([pair[1].path, tmp_path / "bad.safetensors"])
    assert set(caught.value.keys) == set(bad)


def test_progress_counts_the_targets(pair):
    seen = []
    report = compare([each.path for each in pair], progress=lambda *each: seen.append(each))
    assert [number for _, number, _ in seen] == list(range(1, report.targets + 1))
    assert {total for _, _, total in seen} == {report.targets}


OWNER = "layers.0.mlp.experts"


def stacked(path: Path, seed: int, count: int = 3, rank: int = 2, owner: str = OWNER):
    """An adapter of fused experts, stacked in three axes, and its ΔW (experts, out, in)."""
    generator = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(count, 10, rank, generator=generator),
        torch.randn(count, rank, 6, generator=generator),
    )
    stem = f"base_model.model.model.{owner}"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    make.write_safetensors(path, tensors, None)
    return torch.bmm(up.double(), down.double()).numpy()


def test_fused_experts_are_compared_as_one_block_diagonal_matrix(tmp_path: Path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    deltas = [stacked(path, seed, rank=2 + seed) for seed, path in enumerate(paths)]
    dense = [{OWNER: scipy.linalg.block_diag(*delta)} for delta in deltas]
    report = compare(paths, weights=[1.0, -0.5], modules=True, exact=True)
    (found,) = report.pairs
    assert figures(found.relation) == pytest.approx(
        naive(dense[0], {OWNER: -0.5 * dense[1][OWNER]}), abs=1e-6
    )
    (module,) = found.modules
    (ua, va), (ub, vb) = (space(each[OWNER]) for each in dense)
    assert module.ranks == (6, 9)
    assert module.relation.column_overlap == pytest.approx(overlap_of(ua, ub), abs=1e-6)
    assert module.relation.row_overlap == pytest.approx(overlap_of(va, vb), abs=1e-6)
    # Each expert's spaces lie among its own 10 outputs and 6 inputs.
    assert module.relation.column_chance == pytest.approx(3.0 / 10)
    assert module.relation.row_chance == pytest.approx(3.0 / 6)
    angle = math.degrees(scipy.linalg.subspace_angles(ua, ub).min())
    assert module.column_angle == pytest.approx(angle, abs=1e-3)
    many = compare(paths * 9)
    assert many.cosines[0][1] == pytest.approx(-found.relation.cosine, abs=1e-12)


def test_experts_of_other_counts_and_nan_among_them_are_refused(tmp_path: Path):
    one, two, bad = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "bad"))
    stacked(one, 1)
    stacked(two, 2, count=4)
    with pytest.raises(ShapeError, match="disagree on the shape") as caught:
        compare([one, two])
    assert "[3, 10, 6]" in caught.value.keys[0]
    assert "[4, 10, 6]" in caught.value.keys[0]
    tensors = {
        ref.name: ref.load().clone() for ref in next(iter(lt.load(one).modules.values())).factors.values()
    }
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][2, 0, 0] = math.nan
    make.write_safetensors(bad, tensors, None)
    with pytest.raises(NonFiniteError, match=r"bad\.safetensors: 1 tensors") as broken:
        compare([one, bad])
    assert broken.value.keys == (name,)


def test_packed_experts_are_compared_with_the_base_that_counts_them(shared: Path):
    case = shared / "oracle" / "peft_bake__mixtral_target_parameters"
    adapter = lt.load(case / "input" / "adapter")
    with pytest.raises(UnsupportedKindError, match="2 of 4 modules are LoRA on fused experts") as caught:
        compare([adapter, adapter])
    assert "--base" in str(caught.value)
    report = compare([adapter, adapter], weights=[1.0, -2.0], base=case / "input" / "base", modules=True)
    wanted = 0.0
    with (
        open_tensors(case / "input" / "base" / "model.safetensors") as before,
        open_tensors(case / "expected" / "merged.safetensors") as merged,
    ):
        for key in merged.tensors:
            change = merged.tensors[key].load().double() - before.tensors[key].load().double()
            wanted += float(change.square().sum())
    assert report.adapters[0].norm == pytest.approx(math.sqrt(wanted), rel=1e-5)
    (found,) = report.pairs
    assert (found.verdict, found.multiple) == ("scaled", pytest.approx(-2.0))
    assert {f"model.{OWNER}.gate_up_proj", f"model.{OWNER}.down_proj"} < {
        each.target for each in found.modules
    }


def test_two_ways_to_nest_experts_name_the_same_parameters(shared: Path, tmp_path: Path):
    case = shared / "oracle" / "peft_bake__mixtral_target_parameters"
    whole = lt.load(case / "input" / "adapter")
    # The same file without the parameter that is wrapped innermost: what is left is then named as that was.
    tensors = {ref.name: ref.load() for module in whole.modules.values() for ref in module.factors.values()}
    nested = {key: each for key, each in tensors.items() if ".base_layer." not in key}
    config = {**whole.config, "target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "alone").mkdir()
    make.write_safetensors(tmp_path / "alone" / "adapter_model.safetensors", nested, None)
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(config))
    report = compare([whole, tmp_path / "alone"], base=case / "input" / "base", modules=True)
    (found,) = report.pairs
    same = {each.target for each in found.modules if each.relation.distance == pytest.approx(0.0, abs=1e-12)}
    assert f"model.{OWNER}.down_proj" in same
    assert report.adapters[1].missing == (f"model.{OWNER}.gate_up_proj",)


def one_by_one(base: Path, path: Path) -> Path:
    """The base with every expert's weights in tensors of their own, as Mixtral's checkpoints have them."""
    tensors: dict[str, torch.Tensor] = {}
    with open_tensors(base / "model.safetensors") as fused:
        for key, ref in fused.tensors.items():
            owner, _, leaf = key.rpartition(".")
            single = owner.replace("mlp.experts", "block_sparse_moe.experts")
            for number, weight in enumerate(ref.load() if leaf in {"gate_up_proj", "down_proj"} else ()):
                gate, up = weight.chunk(2) if leaf == "gate_up_proj" else (weight, weight)
                parts = {"w1": gate, "w3": up} if leaf == "gate_up_proj" else {"w2": weight}
                tensors |= {f"{single}.{number}.{name}.weight": each.clone() for name, each in parts.items()}
            if leaf not in {"gate_up_proj", "down_proj"}:
                tensors[key] = ref.load().clone()
    path.mkdir()
    make.write_safetensors(path / "model.safetensors", tensors, None)
    (path / "config.json").write_bytes((base / "config.json").read_bytes())
    return path


def test_packed_experts_find_a_base_that_has_them_one_by_one(shared: Path, tmp_path: Path):
    case = shared / "oracle" / "peft_bake__mixtral_target_parameters" / "input"
    adapter = lt.load(case / "adapter")
    split = one_by_one(case / "base", tmp_path / "base")
    assert lt.doctor(case / "adapter", base=split).ok
    report = compare([adapter, adapter], base=split)
    fused = compare([adapter, adapter], base=case / "base")
    assert report.adapters[0].norm == pytest.approx(fused.adapters[0].norm, rel=1e-9)
    assert report.pairs[0].verdict == "same"


def test_adapters_that_change_nothing_are_named(pair):
    report = compare([pair[0].path, pair[0].path, pair[1].path], weights=[0.0, 1.0, 0.0])
    assert report.cosines == ((None, None, None), (None, 1.0, None), (None, None, None))
    assert any(note.startswith("1, 3 change nothing") for note in report.notes)
    assert {each.verdict for each in report.pairs} == {"zero"}
    assert report.same == ()


def test_a_weight_of_two_shapes_is_named_with_both(tmp_path: Path):
    for name, width in (("one", 6), ("two", 8)):
        tensors = {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, width),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(10, 2),
        }
        make.write_safetensors(tmp_path / f"{name}.safetensors", tensors, None)
    with pytest.raises(ShapeError, match=r"q_proj: \[10, 6\] against \[10, 8\]"):
        compare([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
