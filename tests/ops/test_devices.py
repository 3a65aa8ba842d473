"""Devices that are named, absent or odd: what is refused, and what is computed elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.errors import OptionError
from loratools.maths.rank import Rule
from loratools.ops import _device, _extract_batched
from loratools.ops._bake_tensor import BakeJob, bake_tensor
from loratools.ops._changes import Piece, Term
from loratools.ops._extract_tensor import FACTORS, Found, Job, extract_tensor
from loratools.ops.extract import extract
from loratools.ops.merge import merge
from tests.kinds import samples
from tests.ops import checkpoints as make
from tests.ops.baking import Disk, change_of, lora, normal, term
from tests.pretended import Pretended, is_there


@pytest.mark.parametrize("name", ["meta", "nonsense", "", "cpu:x", "hpu", "cuda:-1"])
def test_what_is_no_device_to_compute_on_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="cannot be used here"):
        _device.usable(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_an_absent_device_is_refused_with_the_reason_and_a_way_out(name: str) -> None:
    with pytest.raises(OptionError, match=rf"'{name}' cannot be used here.*auto, cpu") as caught:
        _device.usable(name)
    assert caught.value.expected
    assert caught.value.todo


def test_auto_is_what_the_caller_says() -> None:
    assert _device.usable("auto") == "cpu"
    assert _device.usable("auto", auto="mps") == "mps"
    assert _device.usable("cpu", wanted=torch.float64) == "cpu"


def test_the_pretended_device_refuses_what_a_real_one_does() -> None:
    with Pretended("mps") as apple:
        there = torch.ones(3).to("mps")
        assert is_there(there)
        assert is_there((there * 2)[1:])
        assert there.device.type == "mps"
        assert not is_there(there.cpu())
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="float64"):
            there.double()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
    assert apple.sent == 1
    with Pretended("cuda"):
        assert is_there(torch.ones(3).to("cuda").double())


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("name", samples.NAMES)
def test_a_bake_on_a_device_mixes_nothing_up(tmp_path: Path, name: str, rounding: str, device: str) -> None:
    module, base, _ = samples.sample(name)  # its factors are float64
    job = BakeJob(change_of(Disk(tmp_path).put(base, torch.float16), term(module, 0.7)), rounding=rounding)
    here = bake_tensor(job)
    with Pretended(device) as pretended:
        there = bake_tensor(job._replace(device=device))
    assert pretended.sent
    assert not is_there(there.data)
    assert torch.equal(there.data, here.data)
    assert there.result == here.result


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_what_needs_float64_is_computed_where_there_is_some(
    tmp_path: Path, device: str, stored: torch.dtype, precise: bool
) -> None:
    disk = Disk(tmp_path)
    module, _ = lora(300, 400, 4)
    scale = disk.put(torch.full((300, 1), 0.25)) if stored.itemsize == 1 else None
    change = change_of(disk.put(0.1 * normal(300, 400), stored), term(module), scale=scale)
    here = bake_tensor(BakeJob(change, precise=precise))
    with Pretended(device) as pretended:
        there = bake_tensor(BakeJob(change, precise=precise, device=device))
    on_cpu = device == "mps" and (precise or stored == torch.float64)
    assert bool(pretended.sent) is not on_cpu
    for one, other in ((here.data, there.data), (here.scale, there.scale)):
        assert (one is None and other is None) or torch.equal(one.double(), other.double())
    assert there.result == here.result


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("inside", [True, False])
def test_dora_on_a_device(tmp_path: Path, axis: str, inside: bool, device: str) -> None:
    module, _ = lora(30, 20, 3)
    magnitude = samples.ref(1 + abs(normal(30 if axis == "out" else 20)))
    dora = module._replace(magnitude=magnitude, magnitude_axis=axis)
    weight = Disk(tmp_path).put(normal(30, 20), torch.bfloat16)
    same_on(device, BakeJob(change_of(weight, term(dora, 0.6, inside=inside))))


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("turned", [False, True])
def test_whole_tensors_rows_and_biases_on_a_device(tmp_path: Path, turned: bool, device: str) -> None:
    disk = Disk(tmp_path)
    module, _ = lora(20, 20, 3)
    other = samples.ref(normal(20, 20, seed=1))
    rows = samples.ref(normal(2, 20, seed=2))
    terms = (
        term(module, 0.5)._replace(turned=turned),
        Term(0, 0.5, "replace", tensor=other, turned=turned),
        Term(0, 0.7, "rows", tensor=rows, places=(3, 11), turned=turned),
    )
    same_on(device, BakeJob(change_of(disk.put(normal(20, 20), torch.float16), *terms)))
    bias = module._replace(factors={**module.factors, "up_bias": samples.ref(normal(20, seed=4))})
    same_on(device, BakeJob(change_of(disk.put(normal(20)), Term(0, 0.5, "bias", bias))))


def same_on(device: str, job: BakeJob) -> None:
    """Bake here and there, and compare."""
    here = bake_tensor(job)
    with Pretended(device) as pretended:
        there = bake_tensor(job._replace(device=device))
    assert pretended.sent
    assert torch.equal(there.data, here.data)
    assert there.result == here.result


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    state = make.llama()
    return make.save(state, tmp_path / "base.safetensors"), make.save(
        make.tuned(state), tmp_path / "tuned.safetensors"
    )


def test_where_there_is_no_float64_the_cpu_extracts(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "_problem", lambda name, wanted: "")
    there, one = extract(*pair, rank=3, device="mps")
    here, other = extract(*pair, rank=3, device="cpu")
    assert there is not None
    assert here is not None
    assert one.modules == other.modules
    for target, module in here.modules.items():
        assert torch.equal(module.delta(), there.modules[target].delta())


def test_where_there_is_no_float64_a_merge_says_so(pair) -> None:
    found, _ = extract(*pair, rank=2)
    assert found is not None
    with pytest.raises(OptionError, match=r"'mps' cannot be used here.*float64"):
        merge([found, found], device="mps")


def jobs(tmp_path: Path, count: int = 5) -> list[Job]:
    disk = Disk(tmp_path)
    made = []
    for number in range(count):
        base = normal(60, 40, seed=number)
        pieces = [
            Piece(disk.put(values, torch.float16), ((0, 60, 0),)) for values in (base, base + normal(60, 40))
        ]
        made.append(
            Job(
                number,
                f"w{number}",
                pieces[0],
                (pieces[1],),
                (60, 40),
                60,
                FACTORS,
                Rule("rank", 4),
                store="F32",
            )
        )
    return made


def product(found: Found) -> torch.Tensor:
    assert found.up is not None
    assert found.down is not None
    return found.up.double().t() @ found.down.double()


@pytest.mark.parametrize("room", [3, 1, 0])
def test_a_batch_that_does_not_fit_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    original, sizes = _extract_batched.decompose_batch, []

    def tight(matrices: torch.Tensor, *arguments: object, **options: object) -> object:
        sizes.append(len(matrices))
        if len(matrices) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(matrices, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(_extract_batched, "decompose_batch", tight)
    work = jobs(tmp_path)
    found = {each.number: each for each in _extract_batched.run(work, "cpu")}
    assert max(sizes) == 5
    assert found.keys() == set(range(5))
    for job in work:
        one = extract_tensor(job)
        assert float((product(one) - product(found[job.number])).norm()) <= 1e-5 * one.norm


def test_a_batch_tells_rounding_from_the_difference_as_a_single_matrix_does(tmp_path: Path) -> None:
    disk, shape = Disk(tmp_path), (300, 256)
    base = normal(*shape)
    low = 0.01 * normal(300, 4, seed=1) @ normal(4, 256, seed=2)
    sides = [Piece(disk.put(values, torch.float32), ((0, 300, 0),)) for values in (base, base + low)]
    job = Job(0, "w", sides[0], (sides[1],), shape, 300, FACTORS, Rule("rank", 16))
    assert len(extract_tensor(job).sigma) == 4
    (found,) = _extract_batched.run([job], "cpu")
    assert len(found.sigma) == 4


def test_a_matrix_that_cannot_be_sent_is_decomposed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Job, *_: object) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(_extract_batched, "_send", full)
    work = jobs(tmp_path, 2)
    found = {each.number: each for each in _extract_batched.run(work, "cpu")}
    for job in work:
        assert torch.equal(product(extract_tensor(job)), product(found[job.number]))
