"""One baked tensor against dense float64 arithmetic, for every kind and place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import loratools
from loratools.errors import OptionError, ShapeError
from loratools.io import open_tensors
from loratools.io.base import keys_of
from loratools.model import Module, Target
from loratools.ops import _bake_steps
from loratools.ops._assemble import assemble
from loratools.ops._changes import Piece, Term
from loratools.ops._delta_rows import DeltaRows
from tests.kinds import samples as make
from tests.ops.baking import Array, Disk, bake, change_of, close, lora, normal, term

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.parametrize("name", make.NAMES)
@pytest.mark.parametrize("small", [False, True])
def test_every_kind_adds_its_delta(name: str, small: bool, disk: Disk, monkeypatch) -> None:
    if small:  # blocks of a few rows
        monkeypatch.setattr("loratools.ops._bake_tensor.ELEMENTS", 2 * 72)
    module, base, delta = make.sample(name)
    weight = disk.put(base, torch.float64)
    pieces = (Piece(weight, ((0, make.OUT, 0),)),)
    found = bake(change_of(weight, term(module, -0.7, ((0, make.OUT, 0),), pieces=pieces)))
    close(found.data, base - 0.7 * delta, 1e-12)
    assert found.result.norm == pytest.approx(0.7 * np.linalg.norm(delta))
    assert found.result.kept == pytest.approx(1.0)
    single = disk.put(base)
    found = bake(change_of(single, term(module, -0.7, pieces=(Piece(single, ((0, make.OUT, 0),)),))))
    close(found.data, base - 0.7 * delta, 1e-5)


@pytest.mark.parametrize("name", make.NAMES)
def test_rows_of_a_module_lie_in_several_tensors(name: str, disk: Disk) -> None:
    module, base, delta = make.sample(name)
    # The module's first five rows are the last of one tensor, in two parts; the others begin another.
    first, second = normal(8, *base.shape[1:], seed=1), normal(9, *base.shape[1:], seed=2)
    here, there = ((0, 2, 6), (2, 5, 3)), ((5, 12, 0),)
    first[6:8], first[3:6], second[:7] = base[:2], base[2:5], base[5:]
    weights = disk.put(first, torch.float64), disk.put(second, torch.float64)
    pieces = tuple(Piece(weight, spans) for weight, spans in zip(weights, (here, there), strict=True))
    for weight, spans, wanted in ((weights[0], here, first), (weights[1], there, second)):
        found = bake(change_of(weight, term(module, 1.0, spans, pieces=pieces[::-1])))
        for start, stop, at in spans:
            wanted[at : at + stop - start] += delta[start:stop]
        close(found.data, wanted, 1e-12)


def test_a_tensor_of_several_modules_and_adapters(disk: Disk) -> None:
    base = normal(12, 5)
    (one, first), (two, second), (three, third) = (lora(4, 5, seed=seed) for seed in range(3))
    wide, whole = lora(12, 5, seed=7)
    wanted = base + 0.5 * whole
    wanted[:4] += first
    wanted[4:8] += 2 * second
    wanted[8:] += third
    weight = disk.put(base)
    terms = (
        term(one, 1.0, ((0, 4, 0),)),
        term(two, 2.0, ((0, 4, 4),)),
        term(three, 1.0, ((0, 4, 8),)),
        term(wide, 0.5)._replace(adapter=1),
    )
    found = bake(change_of(weight, *terms))
    close(found.data, wanted)
    assert found.result.adapters == (0, 1)
    assert found.result.norm == pytest.approx(np.linalg.norm(wanted - base), rel=1e-5)


def test_halves_may_be_exchanged(disk: Disk) -> None:
    base = normal(6, 4)
    module, delta = lora(6, 4)
    found = bake(change_of(disk.put(base), term(module, 1.0, ((0, 3, 3), (3, 6, 0)))))
    close(found.data, base + np.concatenate([delta[3:], delta[:3]]))


@pytest.mark.parametrize("name", ["lora", "loha", "ia3-out", "oft", "glora", "lora-dora", "lora-dora-in"])
def test_a_tensor_stored_as_in_and_out(name: str, disk: Disk) -> None:
    module, base, delta = make.sample("oft-diag" if name == "oft" else name.split("-dora")[0])
    if "dora" in name:
        axis = int(name.endswith("in"))
        magnitude = np.random.default_rng(3).uniform(1, 2, size=base.shape[axis])
        module = module._replace(magnitude=make.ref(magnitude), magnitude_axis=("out", "in")[axis])
        delta = decomposed(base, delta, magnitude, axis) - base
    weight = disk.put(base.T, torch.float64)
    pieces = (Piece(weight, ((0, make.OUT, 0),), True),)
    found = bake(change_of(weight, term(module, 2.0, turned=True, pieces=pieces)))
    close(found.data, (base + 2 * delta).T, 1e-6 if "dora" in name else 1e-12)


def decomposed(base: Array, delta: Array, magnitude: Array, axis: int, current: Array | None = None) -> Array:
    """DoRA by rows or columns, one after the other."""
    changed, result = base + delta, (base if current is None else current) + delta
    for place, length in enumerate(magnitude):
        index = (place,) if axis == 0 else (slice(None), place)
        result[index] *= length / np.linalg.norm(changed[index])
    return result


@pytest.mark.parametrize("name", ["lora", "lora-conv", "loha", "lokr-tucker"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("inside", [False, True])
def test_dora_by_both_rules(name: str, axis: int, inside: bool, disk: Disk) -> None:
    module, base, delta = make.sample(name)
    magnitude = np.random.default_rng(5).uniform(1, 2, size=base.shape[axis])
    module = module._replace(magnitude=make.ref(magnitude), magnitude_axis=("out", "in")[axis])
    other = normal(*base.shape, seed=4)
    full = make.module_of("full", {"diff": other}, 1.0)
    # Cut into two tensors, after another adapter.
    cut = 5
    weights = [disk.put(part, torch.float64) for part in (base[:cut], base[cut:])]
    pieces = (Piece(weights[0], ((0, cut, 0),)), Piece(weights[1], ((cut, make.OUT, 0),)))
    strength = 0.6
    if inside:
        wanted = decomposed(base, strength * delta, magnitude, axis, base + other)
    else:
        wanted = base + other + strength * (decomposed(base, delta, magnitude, axis) - base)
    for piece, rows in zip(pieces, (slice(0, cut), slice(cut, None)), strict=True):
        terms = (
            term(full, 1.0, piece.spans),
            term(module, strength, piece.spans, pieces=pieces, inside=inside),
        )
        found = bake(change_of(piece.weight, *terms))
        close(found.data, wanted[rows], 1e-6)  # LyCORIS adds a float32 step to norms of about 3


@pytest.mark.parametrize("case", ["llama_two_dora", "llama_plain_then_dora"])
def test_adapters_one_after_the_other_are_those_of_peft(case: str) -> None:
    folder = ORACLE / f"peft_bake_multi__{case}"
    if not folder.is_dir():
        pytest.skip("the shared reference results are not here")
    said = json.loads((folder / "manifest.json").read_text())
    adapters = [loratools.load(folder / "input" / name) for name in said["params"]["order"]]
    parts = keys_of(folder / "input" / "base" / "model.safetensors").parts[""]
    changed = 0
    with open_tensors(str(folder / "expected" / "merged.safetensors")) as expected:
        for key, weight in parts.items():
            terms = [
                term(module, 1.0, pieces=(Piece(weight, ((0, weight.shape[0], 0),)),), inside=True)
                for adapter in adapters
                for target, module in adapter.modules.items()
                if f"{target.path}.weight" == key
            ]
            if terms:
                changed += 1
                found = bake(change_of(weight, *terms)).data
                wanted = expected.tensors[key].load()
                assert torch.allclose(
                    found, wanted, rtol=said["compare"]["rtol"], atol=said["compare"]["atol"]
                )
    assert changed == len({target for adapter in adapters for target in adapter.modules})


def test_biases(disk: Disk) -> None:
    base = normal(6)
    module, _ = lora(4, 3, scale=0.5)
    up_bias, diff_b = normal(4, seed=1), normal(4, seed=2)
    both = module._replace(
        factors={**module.factors, "up_bias": make.ref(up_bias), "diff_b": make.ref(diff_b)}
    )
    spans = ((0, 2, 4), (2, 4, 0))
    found = bake(change_of(disk.put(base), Term(0, 3.0, "bias", both, spans)))
    added = 3 * (0.5 * up_bias + diff_b)
    wanted = base.copy()
    wanted[4:] += added[:2]
    wanted[:2] += added[2:]
    close(found.data, wanted)
    full = make.module_of("full", {"diff_b": base}, 0.25)
    close(bake(change_of(disk.put(base), Term(0, 2.0, "bias", full))).data, 1.5 * base)
    norm = make.module_of("full", {"w_norm": normal(6, seed=3), "b_norm": base}, 1.0)
    close(bake(change_of(disk.put(base), Term(0, 2.0, "bias", norm))).data, 3 * base)
    close(bake(change_of(disk.put(base), term(norm))).data, base + normal(6, seed=3))
    vector = make.module_of("ia3", {"ia3_l": normal(6, 1, seed=4)}, 1.0)
    wanted = base + 0.5 * base * (normal(6, seed=4) - 1)
    close(bake(change_of(disk.put(base), Term(0, 0.5, "bias", vector))).data, wanted)
    with pytest.raises(ShapeError, match="nothing for a bias of 6 values"):
        bake(change_of(disk.put(base), Term(0, 1.0, "bias", module)))


@pytest.mark.parametrize("turned", [False, True])
def test_values_that_replace_others(turned: bool, disk: Disk) -> None:
    base, other, rows = normal(6, 4), normal(6, 4, seed=1), normal(2, 4, seed=2)
    module, delta = lora(*((4, 6) if turned else (6, 4)))
    added = delta.T if turned else delta
    weight = disk.put(base)
    replace = Term(1, 1.0, "replace", tensor=make.ref(other))
    close(bake(change_of(weight, replace)).data, other)
    close(bake(change_of(weight, replace._replace(strength=0.25))).data, base + 0.25 * (other - base))
    exchange = Term(0, 1.0, "rows", tensor=make.ref(rows), places=(5, 1))
    found = bake(change_of(weight, term(module, turned=turned), exchange))
    wanted = base + added
    wanted[[5, 1]] = rows
    close(found.data, wanted)
    wanted[[5, 1]] = 0.5 * ((base + added)[[5, 1]] + rows)
    close(bake(change_of(weight, term(module, turned=turned), exchange._replace(strength=0.5))).data, wanted)


@pytest.mark.parametrize("turned", [False, True])
def test_values_of_several_adapters_are_summed_as_differences(turned: bool, disk: Disk) -> None:
    """No adapter undoes what another does, whatever their order."""
    base, one, two, rows = normal(6, 4), normal(6, 4, seed=1), normal(6, 4, seed=2), normal(2, 4, seed=3)
    module, delta = lora(*((4, 6) if turned else (6, 4)))
    added, weight = delta.T if turned else delta, disk.put(base)
    terms = [
        term(module, turned=turned),
        Term(1, 0.7, "replace", tensor=make.ref(one), turned=turned),
        Term(2, 0.4, "replace", tensor=make.ref(two), turned=turned),
        Term(3, -0.5, "rows", tensor=make.ref(rows), places=(5, 1), turned=turned),
    ]
    wanted = base + added + 0.7 * (one - base) + 0.4 * (two - base)
    wanted[[5, 1]] -= 0.5 * (rows - base[[5, 1]])
    for order in ((0, 1, 2, 3), (2, 1, 0, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        close(bake(change_of(weight, *(terms[number] for number in order))).data, wanted)


def test_a_larger_vocabulary(disk: Disk) -> None:
    base, other = normal(6, 4), normal(9, 4, seed=1)
    found = bake(change_of(disk.put(base), Term(0, 1.0, "replace", tensor=make.ref(other))))
    close(found.data, other)
    assert found.result.shape == (9, 4)
    found = bake(change_of(disk.put(base), Term(0, 1.0, "replace", tensor=make.ref(other[:3]))))
    close(found.data, other[:3])


@pytest.mark.parametrize("in_first", [False, True])
def test_experts_in_three_axes(in_first: bool, disk: Disk, monkeypatch) -> None:
    monkeypatch.setattr("loratools.ops._bake_tensor.ELEMENTS", 50)  # one expert at a time
    up, down = normal(3, 6, 2, seed=1), normal(3, 2, 5, seed=2)
    delta = 0.5 * np.einsum("eor,eri->eoi", up, down)
    factors = {"up": make.ref(up), "down": make.ref(down)}
    module = Module(
        Target("language_model", "experts"), "experts", factors, 0.5, shape=(3, 6, 5), in_first=in_first
    )
    base = normal(3, 5, 6) if in_first else normal(3, 6, 5)
    found = bake(change_of(disk.put(base), term(module, turned=in_first)))
    close(found.data, base + (delta.transpose(0, 2, 1) if in_first else delta))


@pytest.mark.parametrize("name", ["lokr", "loha", "oft-diag", "full"])
def test_rows_computed_apart_are_those_of_the_whole(name: str) -> None:
    module, base, delta = make.sample(name)
    weight = torch.from_numpy(base) if name == "oft-diag" else None
    rows = DeltaRows(module, make.OUT, weight, torch.float64)
    for start in range(make.OUT):
        for stop in range(start + 1, make.OUT + 1):
            close(rows.of(start, stop), delta[start:stop], 1e-12)
    with pytest.raises(ShapeError, match="base has 24"):
        DeltaRows(module, 24, weight, torch.float64).of(0, 24)


def test_what_does_not_fit_is_refused(disk: Disk) -> None:
    weight = disk.put(normal(6, 4))
    with pytest.raises(ShapeError, match="for 5 inputs, the base has 4"):
        bake(change_of(weight, term(lora(6, 5)[0])))
    with pytest.raises(ShapeError, match="for 8 inputs, the base has 4"):
        bake(change_of(disk.put(normal(12, 4)), term(make.sample("loha").module)))
    module = lora(6, 4)[0]._replace(magnitude=make.ref(np.ones(5)), magnitude_axis="out")
    with pytest.raises(ShapeError, match="5 magnitudes where the base weight has 6"):
        bake(change_of(weight, term(module)))
    with pytest.raises(OptionError, match="rounding 'up'"):
        bake(change_of(weight, term(lora(6, 4)[0])), rounding="up")
    with pytest.raises(ShapeError, match="9 of 12 rows"):
        assemble((Piece(weight, ((0, 3, 0),)), Piece(weight, ((6, 12, 0),))), torch.float32)


def test_a_norm_of_nothing_is_refused() -> None:
    rows = DeltaRows(lora(4, 3)[0], 4, None, torch.float32)
    with pytest.raises(ShapeError, match="without rows"):
        _bake_steps.input_norms(rows, torch.empty(0, 3), 1.0, torch.empty(0))
