"""Resizing and merging in batches, as accelerators do it, on the CPU: the same ΔW, reports and errors as one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import NonFiniteError
from loratools.kinds import lora
from loratools.maths.lowrank_batch import Stack
from loratools.model import Adapter
from loratools.ops import _batching, _resize_batch
from loratools.ops.merge import merge
from loratools.ops.resize import resize

BATCHES = (1, 1 << 13, 1 << 30)
Batched = Callable[[int], None]


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> Batched:
    """Sets how many bytes a batch has, whatever the device."""

    def choose(most: int) -> None:
        for name in ("loratools.ops._merge_run", "loratools.ops.resize"):
            monkeypatch.setattr(sys.modules[name], "batch_bytes", lambda _: most)

    return choose


def spoilt(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Adapter:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return lt.load(path)


def poor(tensors: dict[str, torch.Tensor]) -> None:
    """Some modules are zero, and some of a lower rank than their factors."""
    for number, key in enumerate(sorted(key for key in tensors if key.endswith("lora_up.weight"))):
        if number % 5 == 1:
            tensors[key].zero_()
        if number % 5 == 2:
            tensors[key][:, -1] = tensors[key][:, 0]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Mixed shapes and ranks, convolutions with and without the Tucker form, zero and dependent factors, float64."""
    path = tmp_path_factory.mktemp("mixed") / "in.safetensors"
    options: dict[str, Any] = {"rank": 6, "ranks": {"to_k": 4, "fc1": 3}, "alphas": {"to_v": -3.0}}
    make.kohya(path, "sd15", mid=True, dtype=torch.float64, **options)
    return spoilt(path, poor)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    path = tmp_path_factory.mktemp("other") / "in.safetensors"
    make.kohya(path, "sd15", seed=3, rank=3, dtype=torch.float64, only=["attn", "te1", "in_layers"])
    return spoilt(path, poor)


def same(one: Adapter, two: Adapter, tolerance: float = 1e-10) -> None:
    assert list(one.modules) == list(two.modules)
    assert one.notes == two.notes
    for target, module in one.modules.items():
        found = two.modules[target]
        assert (found.rank, found.scale, found.alpha) == (module.rank, module.scale, module.alpha)
        assert {role: ref.dtype for role, ref in found.factors.items()} == {
            role: ref.dtype for role, ref in module.factors.items()
        }
        (up, down), (left, right) = lora.matrices(module), lora.matrices(found)
        delta = module.scale * (up @ down)
        assert float((found.scale * (left @ right) - delta).norm()) <= tolerance * float(delta.norm())


@pytest.mark.parametrize("most", BATCHES)
@pytest.mark.parametrize(
    "rule",
    [
        {"rank": 3},
        {"rank": 100},
        {"rank": 2, "conv_rank": 1},
        {"energy": 0.9},
        {"ratio": 0.5, "min_rank": 2},
        {"error": 0.3},
        {"size": 60_000, "dtype": "float32"},
        {"energy": 0.8, "to_rank_of": "vllm"},
    ],
    ids=str,
)
def test_a_resize_in_batches(mixed: Adapter, batched: Batched, rule: dict[str, Any], most: int) -> None:
    one, report = resize(mixed, **rule)
    batched(most)
    two, found = resize(mixed, **rule)
    same(one, two, 1e-10 if "dtype" not in rule else 1e-6)
    for each, wanted in zip(found.modules, report.modules, strict=True):
        assert (each.target, each.rank) == (wanted.target, wanted.rank)
        assert each.energy == pytest.approx(wanted.energy, abs=1e-10)
        assert each.error == pytest.approx(wanted.error, abs=1e-7)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kinds_that_are_no_product_are_resized_beside_the_batches(
    tmp_path: Path, batched: Batched, kind: str
) -> None:
    make.kohya(tmp_path / "in.safetensors", "sd15", kind=kind, dtype=torch.float64)
    given = lt.load(tmp_path / "in.safetensors")
    one, _ = resize(given, rank=3)
    batched(1 << 30)
    same(one, resize(given, rank=3)[0])


MERGES: list[dict[str, Any]] = [
    {"method": "linear"},
    {"method": "linear", "rank": 3},
    {"method": "linear", "rank": 3, "boost": 0.5},
    {"method": "svd"},
    {"method": "concat"},
    {"method": "ties", "rank": 4},
    {"method": "knots-ties", "rank": 4},
    {"method": "dare-linear", "rank": 4, "density": 0.5},
]


@pytest.mark.parametrize("most", BATCHES)
@pytest.mark.parametrize("asked", MERGES, ids=str)
def test_a_merge_in_batches(
    mixed: Adapter, other: Adapter, batched: Batched, asked: dict[str, Any], most: int
) -> None:
    one, report = merge([mixed, other], weights=[0.7, -0.4], **asked)
    batched(most)
    two, found = merge([mixed, other], weights=[0.7, -0.4], **asked)
    same(one, two)
    assert found.energy == pytest.approx(report.energy, abs=1e-10)


@pytest.mark.parametrize("method", ["linear", "svd"])
@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("rank", [None, 2])
def test_one_adapter_in_batches(
    mixed: Adapter, batched: Batched, method: str, weight: float, rank: int | None
) -> None:
    one, _ = merge([mixed], weights=[weight], method=method, rank=rank)
    batched(1 << 30)
    same(one, merge([mixed], weights=[weight], method=method, rank=rank)[0])


def test_inputs_off_a_protected_one_in_batches(mixed: Adapter, other: Adapter, batched: Batched) -> None:
    one, _ = merge([mixed], rank=3, protect=[other])
    batched(1 << 30)
    same(one, merge([mixed], rank=3, protect=[other])[0])


@pytest.mark.parametrize("rank", [None, 3])
def test_weights_that_another_input_has_in_parts(tmp_path: Path, batched: Batched, rank: int | None) -> None:
    whole = make.kohya(tmp_path / "whole.safetensors", "flux", seed=1, dtype=torch.float64)
    parted = make.diffusers(tmp_path / "parted.safetensors", "flux", seed=2, dtype=torch.float64)
    inputs = [lt.load(whole.path), lt.load(parted.path)]
    one, _ = merge(inputs, weights=[0.6, 0.4], rank=rank)
    batched(1 << 30)
    same(one, merge(inputs, weights=[0.6, 0.4], rank=rank)[0])


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many matrices were decomposed together, of every stack."""
    seen: list[int] = []
    original = _resize_batch.compress_batch

    def counted(stack: Stack, ranks: list[int | None]) -> object:
        seen.append(len(ranks))
        return original(stack, ranks)

    monkeypatch.setattr(_resize_batch, "compress_batch", counted)
    monkeypatch.setattr(sys.modules["loratools.methods._sums"], "compress_batch", counted)
    return seen


def test_batches_hold_modules_of_one_make_up_up_to_their_bytes(
    mixed: Adapter, other: Adapter, batched: Batched, stacks: list[int]
) -> None:
    kinds = {_batching.alike(module) for module in mixed.modules.values()}
    for most, expected in ((1 << 30, len(kinds)), (1, len(mixed.modules))):
        batched(most)
        stacks.clear()
        resize(mixed, rank=2)
        assert len(stacks) == expected
        assert sum(stacks) == len(mixed.modules)
    batched(1 << 30)
    stacks.clear()
    merge([mixed, other], rank=2)
    assert max(stacks) > 1
    assert sum(stacks) == len(mixed.modules)


def test_by_itself_the_cpu_works_one_by_one(mixed: Adapter, other: Adapter, stacks: list[int]) -> None:
    resize(mixed, rank=2)
    merge([mixed, other], rank=2)
    assert not stacks
    assert _batching.batch_bytes("cpu") == 0
    assert _batching.batch_bytes("cuda:1") == _batching.batch_bytes("cuda") > 0


def broken(tensors: dict[str, torch.Tensor]) -> None:
    ups = sorted(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[ups[3]][0, 0] = float("nan")
    tensors[ups[-2]][1, 1] = float("inf")


@pytest.mark.parametrize("work", [lambda each: resize(each, rank=2), lambda each: merge([each], rank=2)])
def test_all_that_are_not_finite_are_named(
    tmp_path: Path, batched: Batched, work: Callable[[Adapter], object]
) -> None:
    make.kohya(tmp_path / "in.safetensors", "sd15")
    adapter = spoilt(tmp_path / "in.safetensors", broken)
    with pytest.raises(NonFiniteError) as alone:
        work(adapter)
    batched(1 << 30)
    with pytest.raises(NonFiniteError) as together:
        work(adapter)
    assert str(together.value) == str(alone.value)
    assert len(together.value.keys) == 2


@pytest.mark.parametrize("room", [2, 1, 0])
def test_what_does_not_fit_is_divided_and_left_to_the_cpu(
    mixed: Adapter, other: Adapter, batched: Batched, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    original = _batching.sent

    def tight(tensors: list[torch.Tensor], device: str) -> torch.Tensor:
        if len(tensors) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(tensors, device)

    cut, _ = resize(mixed, rank=2)
    merged, _ = merge([mixed, other], rank=3)
    batched(1 << 30)
    for module in (_batching, _resize_batch):
        monkeypatch.setattr(module, "sent", tight)
    same(cut, resize(mixed, rank=2)[0])
    same(merged, merge([mixed, other], rank=3)[0])


def test_progress_counts_every_module(mixed: Adapter, batched: Batched) -> None:
    batched(1 << 30)
    for work in (
        lambda told: resize(mixed, rank=2, progress=told),
        lambda told: merge([mixed], progress=told),
    ):
        seen: list[tuple[str, int, int]] = []
        work(lambda *said, seen=seen: seen.append(said))
        assert {name for name, _, _ in seen} == {str(target) for target in mixed.modules}
        assert [number for _, number, _ in seen] == list(range(1, len(mixed.modules) + 1))


def test_tasks_are_gathered_by_what_they_share() -> None:
    tasks = [("a", 4), ("b", 4), ("a", 4), ("a", 4), ("c", 100), ("c", 1), ("", 1), ("", 1), ("b", 6)]
    found = _batching.gathered(tasks, lambda task: task[0] or None, lambda task: task[1], 10)
    assert found == [
        [("a", 4), ("a", 4)],
        [("b", 4), ("b", 6)],
        [("a", 4)],
        [("c", 100)],
        [("c", 1)],
        [("", 1)],
        [("", 1)],
    ]
