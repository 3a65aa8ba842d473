"""Merges in which little is left to merge: modules that an input lacks, adapters that cancel, one adapter twice.

A module that an input does not have counts as one of weight 0, for every method. Inputs that are each other's negative
leave ΔW = 0 or what a random mask makes of them, never NaN, and the caller is told where nothing is left.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import factories as make
import numpy as np
import pytest

import loratools as lt
from loratools.methods import get, methods
from loratools.ops.merge import merge

NAMES = sorted(methods())
# Those whose result depends on no draw, is odd in the weights, and in which the inputs count alike.
CANCELLING = [
    name
    for name in NAMES
    if "order-free" in get(name).laws
    and not name.endswith("dare")
    and name.split("-")[0] not in ("dare", "della")
]


def deltas(adapter: lt.Adapter) -> dict[str, np.ndarray]:
    return make.deltas_of(adapter)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_an_input_lacks_has_weight_zero_there(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(get(name).most or 3)]
    *others, last = [lt.load(make.kohya(path, seed=seed, rank=2).path) for seed, path in enumerate(paths)]
    kept = {target: module for target, module in last.modules.items() if "mlp" not in target.path}
    assert 0 < len(kept) < len(last.modules)
    found = deltas(lt.merge([*others, replace(last, modules=kept)], method=name))
    silenced = deltas(lt.merge([*others, last], method=name, weight_for={f"{len(paths)}:mlp": 0.0}))
    assert found.keys() == silenced.keys()
    for key, delta in found.items():
        assert np.array_equal(delta, silenced[key]), key


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> lt.Adapter:
    folder = tmp_path_factory.mktemp("one")
    return lt.load(make.kohya(folder / "a.safetensors", "sd15", rank=3, alpha=1.5).path)


@pytest.mark.parametrize("name", NAMES)
def test_opposite_adapters_merge_to_finite_changes(name: str, one: lt.Adapter) -> None:
    merged, report = merge([one, one], weights=[1.0, -1.0], method=name)
    assert len(merged.modules) == len(one.modules)
    assert all(np.isfinite(delta).all() for delta in deltas(merged).values())
    assert 0.0 <= report.energy <= 1.0


@pytest.mark.parametrize("name", CANCELLING)
def test_opposite_adapters_cancel(name: str, one: lt.Adapter) -> None:
    size = math.hypot(*map(np.linalg.norm, deltas(one).values()))
    left = deltas(lt.merge([one, one], weights=[1.0, -1.0], method=name))
    assert math.hypot(*map(np.linalg.norm, left.values())) <= 1e-6 * size


@pytest.mark.parametrize("name", ["linear", "svd", "ties", "iso-c", "core-ties", "model-stock", "lego"])
def test_the_caller_is_told_that_nothing_is_left(name: str, one: lt.Adapter) -> None:
    count = len(one.modules)
    _, report = merge([one, one], weights=[1.0, -1.0], method=name)
    assert [note for note in report.notes if note.startswith(f"{count} of {count} merged modules are zero")]
    assert (report.energy, report.error) == (1.0, 0.0)
    assert {module.norm for module in report.modules} == {0.0}
    _, whole = merge([one, one], method=name)
    assert not [note for note in whole.notes if "are zero" in note]


def test_ranks_and_errors_of_a_merge_are_told_by_component(tmp_path: Path) -> None:
    made = [make.kohya(tmp_path / f"{rank}.safetensors", seed=rank, rank=rank) for rank in (3, 2)]
    adapters = [lt.load(each.path) for each in made]
    whole = deltas(lt.merge(adapters))
    cut, report = merge(adapters, rank=2)
    for module in report.modules:
        assert (module.before, module.rank) == ((3, 2), 2)
    found = deltas(cut)
    groups = {"": list(found)}
    for key in found:
        groups.setdefault(key.partition("/")[0], []).append(key)
    assert set(groups) == {"", *report.components()}
    for name, keys in groups.items():
        lost = math.hypot(*(np.linalg.norm(found[key] - whole[key]) for key in keys))
        size = math.hypot(*(np.linalg.norm(whole[key]) for key in keys))
        group = report.components()[name] if name else report
        assert group.error == pytest.approx(lost / size, rel=1e-5)
        assert group.energy == pytest.approx(1.0 - (lost / size) ** 2, rel=1e-6)
    assert [each["bytes"] for each in report.inputs] == [each.path.stat().st_size for each in made]


def test_a_weight_in_pieces_had_the_rank_of_all_its_pieces(tmp_path: Path) -> None:
    fused = make.kohya(tmp_path / "a.safetensors", "flux", rank=4, only=["double"])
    split = make.diffusers(
        tmp_path / "b.safetensors",
        "flux",
        rank=2,
        only=["transformer_blocks.0.attn.to", "transformer_blocks.1.attn.to"],
    )
    _, report = merge([lt.load(fused.path), lt.load(split.path)])
    (qkv,) = {
        module.before for module in report.modules if len(module.inputs) == 2 and "qkv" in module.target
    }
    assert qkv == (4, 6)
