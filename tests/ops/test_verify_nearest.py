"""The quick way to a verdict: it says no more than the exact one, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loratools.io.base import keys_of
from loratools.model import Module, Target
from loratools.ops import _verify_nearest, _verify_tensor
from loratools.ops._changes import Change, Term
from loratools.ops._verify_tasks import BAKED, Job
from loratools.tensors import from_torch

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def made(tmp_path):
    """Writes W and what is stored, and gives the job of comparing them, with T in float64."""

    def make(store, *, base=torch.float16, size=3.0, shape=(96, 80), turned=False):
        draw = torch.Generator().manual_seed(7)
        weight = (torch.randn(shape, generator=draw) * 0.05).to(base)
        rows, inputs = reversed(shape) if turned else shape
        up, down = torch.randn(rows, 4, generator=draw), torch.randn(4, inputs, generator=draw)
        scale = size * 0.05 * torch.finfo(base).eps / 2
        delta = scale * (up.double() @ down.double())
        target = weight.double() + (delta.T if turned else delta)
        save_file({"w": weight}, tmp_path / "base.safetensors")
        save_file({"w": store(target).contiguous()}, tmp_path / "baked.safetensors")
        before, after = (
            keys_of(tmp_path / f"{name}.safetensors").parts[""]["w"] for name in ("base", "baked")
        )
        goal = Target("denoiser", "w")
        factors = {"up": from_torch("up", up), "down": from_torch("down", down)}
        module = Module(goal, "lora", factors, scale, None, shape=(rows, inputs))
        term = Term(0, 1.0, "weight", module=module, turned=turned)
        return Job(Change("", before, (term,), "denoiser: w", "denoiser"), "w", after)

    return make


def exactly(job, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_verify_tensor, "nearest", lambda _: None)
        return _verify_tensor.verify_tensor(job)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("base", [*DTYPES, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_nearest_is_told_as_by_float64(made, monkeypatch, dtype, base, turned):
    monkeypatch.setattr(_verify_nearest, "_PIECE", 1000)
    job = made(
        lambda target: target.to(dtype), base=base, size=3.0 if base != torch.float32 else 1e5, turned=turned
    )
    assert _verify_nearest.nearest(job) is not None
    quick, exact = _verify_tensor.verify_tensor(job), exactly(job, monkeypatch)
    assert quick.verdict == exact.verdict == BAKED
    assert quick.dtype == exact.dtype
    for name in ("norm", "kept", "error", "rounding"):
        assert getattr(quick, name) == pytest.approx(getattr(exact, name), rel=1e-4), name


def one_off(value):
    def store(target):
        found = target.half()
        found[95, 79] = value
        return found

    return store


@pytest.mark.parametrize(
    "store",
    [
        one_off(0.3),
        one_off(float("nan")),
        one_off(float("inf")),
        lambda target: target.half() + 0.001,
        lambda target: target.half().roll(1, 0),
        lambda target: target.half()[:90],
        lambda target: target.float(),
    ],
    ids=["one value", "NaN", "infinity", "an offset", "other rows", "fewer rows", "float32"],
)
def test_all_else_is_left_to_float64(made, monkeypatch, store):
    job = made(store)
    assert _verify_nearest.nearest(job) is None
    assert _verify_tensor.verify_tensor(job) == exactly(job, monkeypatch)


@pytest.mark.parametrize("size", [0.0, 1e-4])
def test_a_change_that_does_not_show_is_left_to_float64(made, size):
    assert _verify_nearest.nearest(made(lambda target: target.half(), size=size)) is None
