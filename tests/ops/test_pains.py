"""Defects found in other tools, each a test that loratools passes.

They were found in the merging, resizing and conversion code of ai-toolkit, PM-Merger, ComfyUI, sd-scripts, PEFT,
RobustMerge, Iso-C, axolotl and mergekit. What is expected is computed here, densely and in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import factories as make
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import loratools as lt
from loratools.errors import UnsupportedKindError
from loratools.io._model_files import true_index
from loratools.maths.lowrank import Factors
from loratools.maths.rank import Rule
from loratools.maths.svd import decompose
from loratools.methods import Options, Part, get, methods
from loratools.ops.merge import merge_files
from loratools.ops.resize import resize_file

FACTORED = ["attn2_to_k", "conv1", "mlp_fc1"]


class Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor has that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in _tensors(made):
            self.count = max(self.count, each.numel())
        return made


def _tensors(made: Any) -> Iterator[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        yield made
    elif isinstance(made, list | tuple):
        for each in made:
            yield from _tensors(each)


def nearest(delta: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank, by numpy."""
    u, sigma, vh = np.linalg.svd(delta.reshape(delta.shape[0], -1), full_matrices=False)
    return ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).reshape(delta.shape)


@pytest.mark.parametrize("method", ["linear", "concat", "svd"])
def test_a_weight_acts_once_and_makes_no_cross_terms(method: str, tmp_path: Path) -> None:
    """ai-toolkit multiplies A, B and alpha by the strength (its square or cube), and adds A's and B's separately."""
    one = make.kohya(tmp_path / "a.safetensors", seed=1, rank=3, alpha=1.0, only=FACTORED)
    two = make.kohya(tmp_path / "b.safetensors", seed=2, rank=2, alpha=4.0, only=FACTORED)
    paths, out = [one.path, two.path], tmp_path / "m.safetensors"
    merge_files(paths, out, weights=[0.5, -0.25], method=method, rank=5 if method == "svd" else None)
    want = make.total((0.5, one.deltas), (-0.25, two.deltas))
    make.assert_close(make.deltas_of(lt.load(out)), want, 1e-5)


def test_a_conversion_applies_the_scale_once(tmp_path: Path) -> None:
    """ai-toolkit's conversion to PEFT's keys multiplies both factors by alpha / rank."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", seed=1, rank=4, alpha=0.5)
    lt.convert(made.path, tmp_path / "m.safetensors", to="diffusers")
    found = make.whole(lt.load(tmp_path / "m.safetensors"))
    make.assert_close(found, make.whole(lt.load(made.path)), 1e-6)


def test_signs_are_elected_on_changes_with_the_alpha_of_each(tmp_path: Path) -> None:
    """PM-Merger trims and elects on factors, and takes the first adapter's alpha for all."""
    one = make.kohya(tmp_path / "a.safetensors", seed=1, rank=3, alpha=1.0, only=FACTORED)
    two = make.kohya(tmp_path / "b.safetensors", seed=2, rank=3, alpha=6.0, only=FACTORED)
    out = tmp_path / "m.safetensors"
    merge_files([one.path, two.path], out, method="ties", density=1.0, rank=64)
    found = make.deltas_of(lt.load(out))
    for key, first in one.deltas.items():
        second = two.deltas[key]
        agree = np.sign(first) == np.sign(second)
        larger = np.where(np.abs(first) > np.abs(second), first, second)
        want = np.where(agree, (first + second) / 2, larger)
        assert np.linalg.norm(found[key] - want) <= 1e-5 * np.linalg.norm(want), key


def test_a_randomised_decomposition_finds_what_the_full_one_does() -> None:
    """PM-Merger's randomised SVD projects on random directions and never returns to the matrix."""
    torch.manual_seed(0)
    matrix = torch.randn(60, 40, dtype=torch.float64) @ torch.diag(0.9 ** torch.arange(40.0)).double()
    found = decompose(matrix, Rule("rank", 8))
    best = nearest(matrix.numpy(), 8)
    error = np.linalg.norm(((found.u * found.sigma) @ found.vh).numpy() - matrix.numpy())
    assert error <= 1.001 * np.linalg.norm(best - matrix.numpy())


@pytest.mark.parametrize("operation", ["merge", "resize"])
def test_outliers_are_not_clamped(operation: str, tmp_path: Path) -> None:
    """ComfyUI, sd-scripts and stability's nodes clamp singular vectors at a quantile: one spike is cut off."""
    made = make.kohya(tmp_path / "a.safetensors", seed=1, rank=6, only=FACTORED)
    for name, tensor in made.tensors.items():
        if not name.endswith(".alpha"):
            tensor.view(-1)[3] = 1e3
    make.write_safetensors(made.path, made.tensors, None)
    spiked, out = make.deltas_of(lt.load(made.path)), tmp_path / "m.safetensors"
    if operation == "merge":
        merge_files([made.path, made.path], out, weights=[0.5, 0.5], rank=2)
    else:
        resize_file(made.path, out, rank=2)
    for key, delta in make.deltas_of(lt.load(out)).items():
        best = nearest(spiked[key], 2)
        assert np.linalg.norm(delta - best) <= 1e-5 * np.linalg.norm(best), key


@pytest.mark.parametrize("method", ["linear", "svd", "tsv", "iso-c", "knots-mean", "core-tsv"])
def test_no_matrix_is_made_as_large_as_its_longer_side_squared(method: str) -> None:
    """ComfyUI and sd-scripts ask for full_matrices, 21504² values for one layer of Flux."""
    torch.manual_seed(0)
    parts = [Part(Factors(torch.randn(307, 4), torch.randn(4, 2150)), 0.5, 1.0, place) for place in range(2)]
    with Largest() as largest:
        get(method).combine(parts, Options(rank=4))
    # Not even one of ΔW's size: what is held is as large as the factors.
    assert 2150 <= largest.count <= 16 * 2150


def test_a_difference_is_decomposed_without_a_square_of_its_longer_side() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 2150)
    with Largest() as largest:
        decompose(matrix, Rule("rank", 4))
    assert largest.count <= 2 * matrix.numel()


def test_both_factors_carry_the_weights_and_the_scale_once(tmp_path: Path) -> None:
    """PEFT weighted lora_A alone in "linear", and applied the scale twice in its "svd"."""
    one = make.peft(tmp_path / "a", seed=1, rank=4, alpha=8.0)
    two = make.peft(tmp_path / "b", seed=2, rank=4, alpha=2.0)
    want = make.total((0.7, one.deltas), (0.2, two.deltas))
    for method in ("linear", "svd"):
        merge_files([one.path, two.path], tmp_path / method, weights=[0.7, 0.2], method=method, rank=8)
        make.assert_close(make.deltas_of(lt.load(tmp_path / method)), want, 1e-5)


def test_rslora_and_patterns_of_ranks_and_alphas_are_merged_as_they_are_applied(tmp_path: Path) -> None:
    """PEFT takes lora_alpha / r of the first configuration and loses rank_pattern."""
    path = make.LLAMA[0][0]
    one = make.peft(tmp_path / "a", seed=1, rank=4, config={"use_rslora": True}, ranks={path: 6})
    two = make.peft(tmp_path / "b", seed=2, rank=2, alphas={path: 1.0})
    merge_files([one.path, two.path], tmp_path / "m", weights=[1.0, -0.5])
    found = lt.load(tmp_path / "m")
    make.assert_close(make.deltas_of(found), make.total((1.0, one.deltas), (-0.5, two.deltas)), 1e-5)
    ranks = {target.path: module.rank for target, module in found.modules.items()}
    assert ranks[path] == 8
    assert ranks[make.LLAMA[1][0]] == 6


@pytest.mark.parametrize("method", ["linear", "ties", "tsv"])
def test_dora_is_refused_rather_than_merged_without_its_magnitudes(method: str, tmp_path: Path) -> None:
    """PEFT merges DoRA's factors and leaves the magnitudes of the first adapter beside them."""
    made = make.peft(tmp_path / "a", dora=True)
    with pytest.raises(UnsupportedKindError, match="DoRA"):
        merge_files([made.path, made.path], tmp_path / "m", method=method)
    assert not (tmp_path / "m").exists()


def test_biases_of_lora_b_are_never_lost(tmp_path: Path) -> None:
    """PEFT and mergekit drop lora_B.bias; here a merge that cannot hold them says so, and one adapter keeps them."""
    made = make.peft(tmp_path / "a", lora_bias=True)
    merge_files([made.path], tmp_path / "m")
    old, _ = make.read_safetensors(made.file)
    new, _ = make.read_safetensors(tmp_path / "m" / "adapter_model.safetensors")
    assert {key: new[key] for key in old} == old


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_is_that_rank_and_an_energy_needs_no_more(rank: int, tmp_path: Path) -> None:
    """sd-scripts keeps one direction more than asked for, and fails where the rule is met by none or by all."""
    made = make.kohya(tmp_path / "a.safetensors", seed=1, rank=6, only=FACTORED)
    report = resize_file(made.path, tmp_path / "r.safetensors", rank=rank)
    assert {module.rank for module in report.modules} == {rank}
    for key, delta in made.deltas.items():
        sigma = np.linalg.svd(delta.reshape(delta.shape[0], -1), compute_uv=False)
        share = (sigma[:rank] ** 2).sum() / (sigma**2).sum()
        found = resize_file(made.path, tmp_path / "e.safetensors", energy=share * 0.999999, overwrite=True)
        ranks = {make.key_of(each.component, each.target): each.rank for each in found.modules}
        assert ranks[key] == rank
    whole = resize_file(made.path, tmp_path / "w.safetensors", energy=1.0)
    assert {module.rank for module in whole.modules} == {6}


def test_a_module_of_zeros_and_one_of_rank_one_are_resized(tmp_path: Path) -> None:
    """sd-scripts divides by the largest singular value and indexes past the last one."""
    made = make.kohya(tmp_path / "a.safetensors", seed=1, rank=1, only=FACTORED)
    zero = next(name for name in made.tensors if name.endswith("lora_up.weight"))
    made.tensors[zero].zero_()
    make.write_safetensors(made.path, made.tensors, None)
    before = make.deltas_of(lt.load(made.path))
    for rule in ({"ratio": 2.0}, {"energy": 0.9}, {"error": 0.5}, {"rank": 4}):
        resize_file(made.path, tmp_path / "r.safetensors", overwrite=True, **rule)
        found = make.deltas_of(lt.load(tmp_path / "r.safetensors"))
        assert {key: not delta.any() for key, delta in found.items()} == {
            key: not delta.any() for key, delta in before.items()
        }


def test_a_mean_of_singular_values_is_over_directions_that_there_are() -> None:
    """Iso-C's reference averages over min(out, in), and gives strength to vectors that are arbitrary."""
    torch.manual_seed(0)
    parts = [Part(Factors(torch.randn(30, 2), torch.randn(2, 40)).to(torch.float64)) for _ in range(3)]
    total = sum(part.factors.delta() for part in parts)
    sigma = torch.linalg.svdvals(total)[:6]
    found = torch.linalg.svdvals(get("iso-c").combine(parts).factors.delta())
    torch.testing.assert_close(found[:6], torch.full((6,), float(sigma.mean()), dtype=torch.float64))
    assert float(found[6:].max()) <= 1e-12 * float(sigma[0])


@pytest.mark.parametrize("method", [name for name, each in sorted(methods().items()) if each.laws])
def test_factors_are_never_merged_by_themselves(method: str) -> None:
    """RobustMerge's code averages A's and B's: the result depends on how a change is divided between them."""
    torch.manual_seed(0)
    pairs = [Factors(torch.randn(12, 3), torch.randn(3, 10)).to(torch.float64) for _ in range(2)]
    uneven = [pairs[0], Factors(64 * pairs[1].up, pairs[1].down / 64)]
    even, other = (
        get(method).combine([Part(pair, 0.5, 1.0, place) for place, pair in enumerate(each)])
        for each in (pairs, uneven)
    )
    truth = even.factors.delta()
    assert float((other.factors.delta() - truth).norm()) <= 1e-10 * float(truth.norm() + 1.0)


@pytest.mark.parametrize("method", sorted(methods()))
def test_nothing_is_made_on_another_device_than_the_factors(method: str) -> None:
    """mergekit makes an identity on the default device, whatever that of the factors."""
    torch.manual_seed(0)
    parts = [Part(Factors(torch.randn(12, 3), torch.randn(3, 10)), 0.5, 1.0, place) for place in range(2)]
    rank = 3 if "rank" in {option.field for option in get(method).options} else None
    with torch.device("meta"):
        found = get(method).combine(parts, Options(rank=rank)).factors
    assert found.up.device == found.down.device == torch.device("cpu")


def test_an_index_states_the_size_of_what_was_written(tmp_path: Path) -> None:
    """axolotl copies total_size from the base."""
    original = tmp_path / "model.safetensors.index.json"
    original.write_text('{"metadata": {"total_size": 1}, "weight_map": {"a": "1.safetensors"}}')
    assert true_index(original, {"a": "1.safetensors"}, {"a": 40})["metadata"] == {"total_size": 40}
