"""A baked tensor in its store dtype: what is kept, every rounding, float8 scales, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.engine import local
from loratools.errors import NonFiniteError
from loratools.io.base import load
from loratools.ops._bake_tensor import BakeJob, bake_tensor
from loratools.ops._changes import Term
from loratools.tensors import from_torch
from tests.kinds import samples as make
from tests.ops.baking import Disk, bake, change_of, close, lora, normal, term


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_nearest_is_that_of_the_exact_result(dtype: torch.dtype, disk: Disk) -> None:
    weight = disk.put(normal(300, 280), dtype)
    base = load(weight).double().numpy()
    module, delta = lora(300, 280, 8, scale=1e-2)
    target = torch.from_numpy(base + delta)
    wanted = target.to(dtype)
    precise = bake(change_of(weight, term(module)), precise=True)
    assert torch.equal(precise.data, wanted)
    assert not precise.result.sampled
    stored = wanted.double().numpy()
    size = np.linalg.norm(delta)
    kept, error = ((stored - base) * delta).sum() / size**2, np.linalg.norm(stored - base - delta) / size
    assert precise.result.kept == pytest.approx(kept, rel=1e-9)
    assert precise.result.error == pytest.approx(error, rel=1e-9)
    usual = bake(change_of(weight, term(module)))
    assert usual.result.sampled
    assert usual.result.norm == pytest.approx(size, rel=1e-5)
    assert usual.result.kept == pytest.approx(kept, abs=0.02)
    assert usual.result.error == pytest.approx(error, rel=0.05)
    # In float32 a value in the very middle between two may fall on the other side.
    assert int((usual.data != wanted).sum()) < 10


def test_a_sample_without_any_change_is_no_measure(disk: Disk) -> None:
    up = np.zeros((1000, 1))
    up[501] = 1.0
    module = make.module_of("lora", {"up": up, "down": np.ones((1, 200))}, 1.0)
    weight = disk.put(normal(1000, 200), torch.bfloat16)
    found = bake(change_of(weight, term(module)))
    assert not found.result.sampled
    assert found.result.kept == pytest.approx(1.0, abs=0.05)
    wanted = load(weight).float()
    wanted[501] += 1.0
    assert torch.equal(found.data, wanted.bfloat16())


def test_no_change_keeps_nothing_and_every_bit(disk: Disk) -> None:
    weight = disk.put(normal(400, 300), torch.float16)
    module, _ = lora(400, 300)
    found = bake(change_of(weight, term(module, 0.0)))
    assert (found.result.norm, found.result.kept, found.result.error) == (0.0, None, None)
    assert torch.equal(found.data, load(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_stochastic_rounding_depends_on_the_seed_and_the_key_alone(dtype: torch.dtype, disk: Disk) -> None:
    weight = disk.put(normal(64, 48), dtype)
    base = load(weight).double().numpy()
    module, delta = lora(64, 48, scale=1e-3)
    change = change_of(weight, term(module))
    found = [bake(change, rounding="stochastic", seed=seed).data.double().numpy() for seed in range(400)]
    assert not np.array_equal(found[0], found[1])
    other = change._replace(weight=weight._replace(key="other"))
    assert not torch.equal(
        bake(other, rounding="stochastic").data.float(), torch.from_numpy(found[0]).float()
    )
    again = bake(change, rounding="stochastic").data.double().numpy()
    assert np.array_equal(found[0], again)
    # On the average nothing of ΔW is lost.
    mean, sigma = np.mean(found, axis=0), np.std(found, axis=0) / 20
    off = np.linalg.norm(mean - base - delta)
    assert off < 1.2 * np.linalg.norm(sigma)


@pytest.mark.parametrize("turned", [False, True])
def test_compensated_rounding_saves_the_change(turned: bool, disk: Disk) -> None:
    weight = disk.put(normal(256, 300), torch.bfloat16)
    base = load(weight).double().numpy()
    modules = [lora(*((300, 256) if turned else (256, 300)), 4, seed, 1e-4) for seed in range(2)]
    delta = sum(made[1].T if turned else made[1] for made in modules)
    change = change_of(weight, *(term(module, turned=turned) for module, _ in modules))
    left, right = np.linalg.svd(delta)[0][:, :8], np.linalg.svd(delta)[2][:8].T
    kept, gap = {}, {}
    for rounding in ("nearest", "compensated"):
        found = bake(change, rounding=rounding)
        error = found.data.double().numpy() - base - delta
        gap[rounding] = np.linalg.norm(left.T @ error @ right)
        kept[rounding] = found.result.kept
        assert found.result.note == ""
    assert gap["compensated"] < gap["nearest"] / 8
    assert abs(kept["compensated"] - 1) < 0.1 < abs(kept["nearest"] - 1)


def test_compensation_leaves_rows_alone_that_no_adapter_touches(disk: Disk) -> None:
    base = normal(64, 40)
    base[0, :20] = 0.0
    weight = disk.put(base, torch.bfloat16)
    module, _ = lora(20, 40, 4, scale=1e-3)
    found = bake(change_of(weight, term(module, 1.0, ((0, 20, 30),))), rounding="compensated")
    before = load(weight)
    assert torch.equal(found.data[:30], before[:30])
    assert torch.equal(found.data[50:], before[50:])


def test_where_there_is_no_subspace_the_note_says_so(disk: Disk) -> None:
    module, base, _ = make.sample("loha")
    weight = disk.put(base, torch.bfloat16)
    found = bake(change_of(weight, term(module)), rounding="compensated")
    assert found.result.note == "no low-rank change: rounded to nearest"
    assert torch.equal(found.data, bake(change_of(weight, term(module))).data)
    mixed = change_of(weight, term(module), term(make.sample("lora").module))
    assert bake(mixed, rounding="compensated").result.note == "compensated for its low-rank changes alone"


SCALES = {"one": (), "row": (40, 1), "vector": (40,), "block": (1, 2)}


@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_float8_with_scales(form: str, rounding: str, disk: Disk) -> None:
    scale = disk.put(torch.rand(SCALES[form], generator=torch.Generator().manual_seed(0)) * 0.01 + 0.01)
    weight = disk.put(normal(40, 200) * 30, torch.float8_e4m3fn)
    factor = load(scale).double().reshape(-1, 1)
    if form == "block":
        factor = load(scale).double().repeat_interleave(128, 1)[:, :200]
    base = (load(weight).double() * factor).numpy()
    module, delta = lora(40, 200, 2, scale=0.01)
    found = bake(change_of(weight, term(module), scale=scale), rounding=rounding)
    assert found.data.dtype == torch.float8_e4m3fn
    assert found.scale is None
    stored = (found.data.double() * factor).numpy()
    kept = ((stored - base) * delta).sum() / np.linalg.norm(delta) ** 2
    assert found.result.kept == pytest.approx(kept, rel=1e-4)
    assert found.result.norm == pytest.approx(np.linalg.norm(delta), rel=1e-4)
    limit = 32 * factor.numpy() * (1 if rounding == "stochastic" else 0.6)
    assert bool((np.abs(stored - base - delta) <= limit).all())
    if rounding == "nearest":
        assert torch.equal(
            found.data.float(), (torch.from_numpy(base + delta) / factor).to(torch.float8_e4m3fn).float()
        )
    if rounding == "compensated":
        assert abs(kept - 1) < 0.02


def test_a_float8_scale_grows_and_the_report_says_so(disk: Disk) -> None:
    values = torch.full((4, 6), 400.0)
    weight, scale = disk.put(values, torch.float8_e4m3fn), disk.put(torch.tensor(0.5))
    module = make.module_of("full", {"diff": np.full((4, 6), 100.0)}, 1.0)
    found = bake(change_of(weight, term(module), scale=scale))
    base = load(weight).float() * 0.5
    assert found.scale is not None
    assert found.scale.shape == ()
    assert float(found.scale) == pytest.approx((float(base[0, 0]) + 100) / 448)
    assert found.result.note == "1 of 1 float8 scales grew, by up to 1.3 x"
    close(found.data.float() * found.scale, (base + 100).double().numpy(), 1e-6)


def test_another_store_dtype(disk: Disk) -> None:
    scale, weight = disk.put(torch.tensor(0.02)), disk.put(normal(8, 6) * 40, torch.float8_e5m2)
    module, delta = lora(8, 6)
    base = load(weight).double().numpy() * float(load(scale))
    change = change_of(weight, term(module), scale=scale)
    found = bake(change, dtype="F32")
    assert found.scale is None
    assert found.result.dtype == "F32"
    close(found.data, base + delta)
    exact = bake(change, dtype="F64", precise=True)
    assert exact.data.dtype == torch.float64
    close(exact.data, base + delta, 1e-12)
    assert bake(change, dtype="BF16").data.dtype == torch.bfloat16


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_what_is_not_finite_is_named(rounding: str, disk: Disk) -> None:
    module, _ = lora(6, 4)
    bad = normal(6, 4)
    bad[2, 1] = np.nan
    weight = disk.put(bad, torch.float16)
    with pytest.raises(NonFiniteError, match="base holds NaN") as raised:
        bake(change_of(weight, term(module)), rounding=rounding)
    assert (raised.value.path, raised.value.keys) == (weight.file, (weight.key,))
    whole = disk.put(normal(6, 4), torch.float16)
    factors = {**module.factors, "up": module.factors["up"]._replace(name="w.lora_up.weight")}
    factors["up"] = from_torch("w.lora_up.weight", factors["up"].load() * float("inf"))
    with pytest.raises(NonFiniteError, match=r"adapter hold NaN or infinity \(w.lora_up.weight\)"):
        bake(change_of(whole, term(module._replace(factors=factors))), rounding=rounding)
    with pytest.raises(
        NonFiniteError, match=r"largest finite value is .*F16 holds finite values up to 65504.*--dtype"
    ):
        bake(change_of(whole, term(module, 1e6)), rounding=rounding)
    assert bool(
        bake(change_of(whole, term(module, 1e6)), rounding=rounding, dtype="BF16").data.isfinite().all()
    )


def test_threads_change_no_bit_and_the_work_can_travel(disk: Disk) -> None:
    module, _ = lora(700, 300, 16)
    half = {role: from_torch("", ref.load().half()) for role, ref in module.factors.items()}
    weights = [disk.put(normal(700, 300, seed=seed), torch.bfloat16) for seed in range(6)]
    jobs = [
        BakeJob(change_of(weight, term(module._replace(factors=half))), rounding=rounding, seed=5)
        for weight in weights
        for rounding in ("nearest", "stochastic", "compensated")
    ]
    runs = [list(local.run(bake_tensor, jobs, threads=threads)) for threads in (1, 4)]
    backwards = list(local.run(bake_tensor, jobs[::-1], threads=2))[::-1]
    for one, *others in zip(*runs, backwards, strict=True):
        for other in others:
            assert torch.equal(one.data, other.data)
            assert one.result == other.result
    plain = BakeJob(change_of(weights[0], Term(0, 1.0, "replace")))
    assert pickle.loads(pickle.dumps(plain)) == plain
