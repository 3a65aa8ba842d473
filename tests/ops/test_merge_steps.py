"""Protection before any method and boosting after it, judged by dense ΔW in float64."""

from __future__ import annotations

import json
from pathlib import Path

import factories as make
import numpy as np
import pytest

import loratools as lt
from loratools.errors import NonFiniteError, OptionError
from loratools.ops.merge import merge, merge_files


@pytest.fixture
def adapters(tmp_path: Path) -> list[make.Made]:
    """A style, and two others; the first of them of a higher rank."""
    return [
        make.kohya(tmp_path / f"{seed}.safetensors", "sd15", seed=seed, rank=2 + seed % 2)
        for seed in range(3)
    ]


def dense(adapter: lt.Adapter) -> dict[str, np.ndarray]:
    return {
        key: delta.reshape(delta.shape[0], -1).astype(np.float64)
        for key, delta in make.deltas_of(adapter).items()
    }


def kept_off(matrix: np.ndarray, style: np.ndarray, energy: float, share: float) -> np.ndarray:
    """What is left of a matrix without a share of what lies along the style's leading right singular vectors."""
    _, sigma, vh = np.linalg.svd(style, full_matrices=False)
    held = np.cumsum(sigma**2) / np.sum(sigma**2)
    count = int(np.argmax(held >= energy - 1e-6)) + 1
    basis = vh[:count].T
    return matrix - share * matrix @ basis @ basis.T


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for key, want in expected.items():
        assert np.linalg.norm(found[key] - want) <= 2e-5 * max(1e-3, np.linalg.norm(want)), key


@pytest.mark.parametrize(("energy", "strength", "share"), [(1.0, None, 1.0), (0.6, 1.0, 0.5)])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_inputs_are_kept_off_a_style_that_is_not_merged(
    adapters: list[make.Made], energy: float, strength: float | None, share: float, layout: str
) -> None:
    style, one, two = (lt.load(made.path) for made in adapters)
    found, report = merge(
        [one, two],
        weights=[0.8, -0.5],
        protect=[style],
        protect_energy=energy,
        protect_strength=strength,
        layout=layout,
        dtype="float32",
    )
    styles, first, second = map(dense, (style, one, two))
    if layout == "kohya":
        expected = {
            key: 0.8 * kept_off(first[key], styles[key], energy, share)
            - 0.5 * kept_off(second[key], styles[key], energy, share)
            for key in first
        }
        assert_same(dense(found), expected)
    assert report.options["protect"] == "0.safetensors"
    assert report.options["protect-strength"] == strength


def test_a_style_that_is_an_input_stays_as_it_is(adapters: list[make.Made], tmp_path: Path) -> None:
    paths = [made.path for made in adapters[:2]]
    merge_files(paths, tmp_path / "m.safetensors", protect=[paths[0]], dtype="float32")
    style, one = (dense(lt.load(path)) for path in paths)
    expected = {key: style[key] + kept_off(one[key], style[key], 1.0, 1.0) for key in style}
    found = dense(lt.load(tmp_path / "m.safetensors"))
    assert_same(found, expected)
    # To whatever the style answers, the merged adapter answers as the style does.
    for key, delta in style.items():
        _, _, vh = np.linalg.svd(delta, full_matrices=False)
        answered = vh[:2].T
        assert np.allclose(found[key] @ answered, delta @ answered, atol=1e-5)


def test_a_single_input_is_not_carried_past_the_protection(adapters: list[make.Made]) -> None:
    style, one = (lt.load(made.path) for made in adapters[:2])
    found, _ = merge([one], protect=[style], dtype="float32")
    styles, first = dense(style), dense(one)
    assert_same(dense(found), {key: kept_off(first[key], styles[key], 1.0, 1.0) for key in first})


def test_modules_that_the_style_lacks_are_left_alone(adapters: list[make.Made], tmp_path: Path) -> None:
    narrow = make.kohya(tmp_path / "narrow.safetensors", "sd15", seed=0, only=["attn1"])
    style, one = lt.load(narrow.path), lt.load(adapters[1].path)
    found, _ = merge([one], protect=[style])
    assert set(found.modules) == set(one.modules)
    alike = {
        key.path: bool((found.modules[key].factors["up"].load() == module.factors["up"].load()).all())
        for key, module in one.modules.items()
    }
    assert alike == {path: "attn1" not in path for path in alike}
    assert set(alike.values()) == {True, False}


def test_boosting_raises_the_small_singular_values(adapters: list[make.Made]) -> None:
    one, two = (lt.load(made.path) for made in adapters[:2])
    share = 0.5
    found, report = merge([one, two], boost=share, dtype="float32")
    plain, _ = merge([one, two], dtype="float32")
    boosted = dense(found)
    for key, delta in dense(plain).items():
        u, sigma, vh = np.linalg.svd(delta, full_matrices=False)
        rank = int(np.sum(sigma > 1e-5 * sigma[0]))
        at = int(np.argmax(np.cumsum(sigma[:rank]) >= share * np.sum(sigma[:rank])))
        raised = np.maximum(sigma[:rank], sigma[at])
        assert raised[-1] > sigma[rank - 1]
        expected = (u[:, :rank] * raised) @ vh[:rank]
        assert np.linalg.norm(boosted[key] - expected) <= 1e-4 * np.linalg.norm(expected)
    assert report.options["boost"] == share
    assert report.energy == pytest.approx(1.0)


def test_one_adapter_is_boosted_too(adapters: list[make.Made]) -> None:
    one = lt.load(adapters[1].path)
    found, _ = merge([one], boost=0.0, dtype="float32")
    for key, delta in dense(found).items():
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert np.allclose(sigma[:3], sigma[0], rtol=1e-4), key


def test_boosting_nothing_leaves_nothing(adapters: list[make.Made]) -> None:
    one = lt.load(adapters[0].path)
    found, _ = merge([one, one], weights=[1.0, -1.0], boost=0.5)
    assert all(np.abs(delta).max() < 1e-6 for delta in dense(found).values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boost": 1.5}, "boost is 1.5"),
        ({"protect_energy": 0.0}, "protect energy is 0.0"),
        ({"protect_strength": -1.0}, "protect strength is -1.0"),
        ({"protect_strength": float("nan")}, "protect strength is nan"),
    ],
)
def test_values_out_of_range_are_refused(adapters: list[make.Made], options: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        lt.merge([lt.load(adapters[0].path)], **options)


def test_a_merge_of_styles_alone_is_refused(adapters: list[make.Made], tmp_path: Path) -> None:
    path = adapters[0].path
    with pytest.raises(OptionError, match="every input is one of the protected"):
        merge_files([path], tmp_path / "m.safetensors", protect=[path])
    assert not (tmp_path / "m.safetensors").exists()


def test_what_kept_inputs_off_is_in_the_recipe(adapters: list[make.Made]) -> None:
    style, one = (lt.load(made.path) for made in adapters[:2])
    found, _ = merge([one], protect=[style], protect_energy=0.5, boost=0.0)
    said = json.loads(found.metadata["loratools.recipe"])
    assert [row["path"] for row in said["protect"]] == ["0.safetensors"]
    assert (said["protect_energy"], said["boost"]) == (0.5, 0.0)


def test_a_style_with_nan_is_named(adapters: list[make.Made], tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in adapters[0].tensors.items()}
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key].view(-1)[0] = float("nan")
    make.write_safetensors(tmp_path / "nan.safetensors", tensors, {})
    style, one = lt.load(tmp_path / "nan.safetensors", arch="sd15"), lt.load(adapters[1].path)
    with pytest.raises(NonFiniteError, match=r"nan\.safetensors.*NaN or Inf") as caught:
        merge([one], protect=[style])
    assert caught.value.keys == (key,)
    _, report = merge([one], protect=[style], allow_nonfinite=True)
    assert sum("neither protected nor boosted" in note for note in report.notes) == 1
