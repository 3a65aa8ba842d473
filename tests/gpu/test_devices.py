"""The same merge and resize on a GPU and on the CPU: ΔW agrees to float64's rounding, before the store dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch

import loratools as lt
from loratools import methods
from loratools.kinds import lora
from loratools.maths.lowrank import COMPUTE, Compressed, Factors, compress
from loratools.maths.lowrank_batch import Stack, compress_batch, singular_values_batch
from loratools.maths.spectrum import singular_values
from loratools.model import Adapter
from loratools.ops import _batching
from loratools.ops.merge import merge
from loratools.ops.resize import resize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def parts(device: str, count: int = 3) -> list[methods.Part]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for rank, weight in zip((8, 16, 4), (0.7, -0.4, 1.2), strict=True):
        up = torch.randn(320, rank, generator=generator, dtype=torch.float64)
        down = torch.randn(rank, 768, generator=generator, dtype=torch.float64)
        found.append(methods.Part(Factors(up.to(device), down.to(device)), weight))
    return found[:count]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("linear", {"rank": 8}),
        ("concat", {}),
        ("ties", {"rank": 320, "density": 0.3}),
        ("ties", {"rank": 24, "density": 0.3}),
    ],
)
def test_gpu_equals_cpu(method: str, options: dict[str, float]) -> None:
    chosen = methods.methods()[method]
    settings = methods.Options(**options)
    there = chosen.combine(parts("cuda"), settings)
    here = chosen.combine(parts("cpu"), settings)
    assert there.factors.up.device.type == "cuda"
    expected = here.factors.delta()
    error = (there.factors.delta().cpu() - expected).norm() / expected.norm()
    assert error < 1e-9
    assert there.energy == pytest.approx(here.energy, abs=1e-9)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Adapter]:
    """Two of float64, of mixed ranks and shapes, with convolutions in the Tucker form."""
    folder = tmp_path_factory.mktemp("inputs")
    options: dict[str, Any] = {
        "ranks": {"to_k": 4, "fc1": 3},
        "alphas": {"to_v": -3.0},
        "dtype": torch.float64,
    }
    one = make.kohya(folder / "one.safetensors", "sd15", rank=6, mid=True, **options)
    two = make.kohya(
        folder / "two.safetensors", "sd15", rank=5, seed=2, dtype=torch.float64, only=["attn", "te1"]
    )
    return lt.load(one.path), lt.load(two.path)


def same(one: Adapter, two: Adapter) -> None:
    assert list(one.modules) == list(two.modules)
    for target, module in one.modules.items():
        (up, down), (left, right) = lora.matrices(module), lora.matrices(two.modules[target])
        assert left.device.type == "cpu"
        delta = module.scale * (up @ down)
        difference = two.modules[target].scale * (left @ right) - delta
        assert float(difference.norm()) <= 1e-9 * float(delta.norm())


@pytest.mark.parametrize(
    "rule",
    [{"rank": 3}, {"energy": 0.9}, {"ratio": 0.5}, {"size": 120_000}, {"rank": 2, "to_rank_of": "vllm"}],
)
def test_a_resize_on_a_gpu(inputs: tuple[Adapter, Adapter], rule: dict[str, Any]) -> None:
    (here, one), (there, two) = (resize(inputs[0], device=device, **rule) for device in ("cpu", "cuda"))
    same(here, there)
    assert [each.rank for each in two.modules] == [each.rank for each in one.modules]


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_resize_of_other_kinds_on_a_gpu(tmp_path: Path, kind: str) -> None:
    given = lt.load(make.kohya(tmp_path / "in.safetensors", "sd15", kind=kind, dtype=torch.float64).path)
    same(*(resize(given, rank=3, device=device)[0] for device in ("cpu", "cuda")))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("method", ["linear", "svd", "ties", "knots-ties"])
def test_a_merge_on_a_gpu(inputs: tuple[Adapter, Adapter], method: str, rank: int | None) -> None:
    options: dict[str, Any] = {"weights": [0.7, -0.4], "method": method, "rank": rank}
    same(*(merge(inputs, device=device, **options)[0] for device in ("cpu", "cuda")))


@pytest.mark.parametrize("rank", [8, 64])
def test_a_stack_on_a_gpu(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(9, 320, rank, generator=generator, dtype=COMPUTE)
    down = torch.randn(9, rank, 768, generator=generator, dtype=COMPUTE)
    up[1] = 0.0
    up[2, :, -1] = up[2, :, 0]
    stack = Stack(up.cuda(), down.cuda())
    for kept in (None, 5):
        for index, found in enumerate(compress_batch(stack, [kept] * 9)):
            agree(found, compress(Factors(up[index], down[index]), kept))
    for index, values in enumerate(singular_values_batch(stack)):
        wanted = singular_values(Factors(up[index], down[index]))
        assert values.real == wanted.real
        torch.testing.assert_close(
            values.sigma, wanted.sigma, rtol=0.0, atol=1e-11 * float(wanted.sigma[0] or 1.0)
        )


def agree(found: Compressed, wanted: Compressed) -> None:
    assert found.factors.up.device.type == "cuda"
    assert found.factors.rank == wanted.factors.rank
    assert found.energy == pytest.approx(wanted.energy, abs=1e-12)
    difference = found.factors.delta().cpu() - wanted.factors.delta()
    assert float(difference.norm()) <= 1e-11 * float(wanted.sigma.norm())


def test_what_is_sent_and_fetched_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = _batching._pinned, []

    def noted(*arguments: Any) -> torch.Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(_batching, "_pinned", noted)
    given = [torch.randn(5, 3, dtype=COMPUTE) for _ in range(4)]
    there = _batching.sent(given, "cuda")
    back = _batching.fetched([there[0], there[1:, :, :2]])
    assert all(each.is_pinned() for each in seen)
    assert len(seen) == 2
    assert torch.equal(back[0], given[0])
    assert torch.equal(back[1], torch.stack(given[1:])[:, :, :2])


def test_memory_is_that_of_the_batches_under_way(
    inputs: tuple[Adapter, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_batching, "_UNDER_WAY", 1 << 16)
    resize(
        inputs[0], rank=2, device="cuda", threads=4
    )  # what libraries keep for themselves is there from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seen: list[int] = []
    many = [(index, torch.randn(512, 16, dtype=COMPUTE)) for index in range(64)]

    def work(batch: list[tuple[int, torch.Tensor]]) -> list[int]:
        there = _batching.sent([tensor for _, tensor in batch], "cuda")
        seen.append(len(_batching.fetched([there * 2.0])))
        return [index for index, _ in batch]

    batches = _batching.gathered(many, lambda _: "alike", lambda _: 1 << 16, 1 << 16)
    done = _batching.run(work, lambda task: task[0], batches, "cuda", size=lambda _: 1 << 16, threads=4)
    assert [result for _, result in done] == list(range(64))
    assert len(seen) == 64
    # 64 KiB each, 4 MiB in all: one at a time, its double and what the copy gathers.
    assert torch.cuda.max_memory_allocated() - before <= 5 << 16
