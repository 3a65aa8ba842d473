"""Multipliers per component and per block act on ΔW of what they name, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import factories as make
import numpy as np
import pytest

import loratools as lt
from loratools import archs
from loratools.errors import OptionError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[lt.Adapter, lt.Adapter]:
    folder = tmp_path_factory.mktemp("pair")
    paths = [make.kohya(folder / f"{seed}.safetensors", "sdxl", seed=seed).path for seed in (1, 2)]
    return lt.load(paths[0]), lt.load(paths[1])


def ratio(merged: lt.Adapter, plain: lt.Adapter) -> dict[str, float]:
    """How much of each module's ΔW is there, by target: 1 for all of it, 0 for a module that is absent."""
    found = {}
    for target, module in plain.modules.items():
        before = module.delta().numpy().ravel()
        after = merged.modules[target].delta().numpy().ravel() if target in merged.modules else 0 * before
        found[str(target)] = float(after @ before / (before @ before))
        assert np.allclose(after, found[str(target)] * before, atol=1e-5)
    return found


def test_a_component_weight_scales_that_component_alone(pair: tuple[lt.Adapter, lt.Adapter]) -> None:
    one, _ = pair
    found = ratio(lt.merge([one], component_weights={"text_encoder": 0.25}), one)
    for target, module in one.modules.items():
        expected = 0.25 if module.target.component == "text_encoder" else 1.0
        assert found[str(target)] == pytest.approx(expected, abs=1e-4)


def test_block_weights_by_label_and_by_path(pair: tuple[lt.Adapter, lt.Adapter]) -> None:
    one, _ = pair
    table = archs.get("sdxl")
    label = next(table.block(t.component, t.path) for t in one.modules if t.component == "denoiser")
    assert label is not None
    target = next(t for t in one.modules if table.block(t.component, t.path) != label)
    found = ratio(lt.merge([one], block_weights={label: -0.5, target.path: 3.0}), one)
    for each in one.modules:
        named = table.block(each.component, each.path) == label
        expected = 3.0 if each.path == target.path else -0.5 if named else 1.0
        assert found[str(each)] == pytest.approx(expected, abs=1e-3)


def test_a_weight_of_zero_leaves_the_block_out(pair: tuple[lt.Adapter, lt.Adapter]) -> None:
    one, _ = pair
    merged = lt.merge([one], component_weights={"denoiser": 0.0})
    assert {target.component for target in merged.modules} == {
        target.component for target in one.modules if target.component != "denoiser"
    }


def test_sets_for_each_input_multiply_its_weight(pair: tuple[lt.Adapter, lt.Adapter]) -> None:
    one, two = pair
    merged = lt.merge(
        [one, two], weights=[0.5, 2.0], component_weights=[{"denoiser": 0.2}, {"denoiser": -1.0}]
    )
    for target, module in merged.modules.items():
        first, second = (0.1, -2.0) if target.component == "denoiser" else (0.5, 2.0)
        expected = first * one.modules[target].delta() + second * two.modules[target].delta()
        assert float((module.delta() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("length", sorted(archs.get("sdxl").vectors))
def test_a_vector_names_the_blocks_in_order(pair: tuple[lt.Adapter, lt.Adapter], length: int) -> None:
    one, _ = pair
    vector = [0.1 * (position + 1) for position in range(length)]
    named = dict(zip(archs.get("sdxl").vectors[length], vector, strict=True))
    by_vector, by_name = lt.merge([one], block_weights=vector), lt.merge([one], block_weights=named)
    assert set(by_vector.modules) == set(by_name.modules)
    for target, module in by_vector.modules.items():
        assert (module.delta() == by_name.modules[target].delta()).all()


def test_text_encoders_are_the_base_of_a_vector() -> None:
    assert archs.get("sdxl").block("text_encoder_2", "transformer.resblocks.0.attn.in_proj") == "BASE"
    assert archs.get("sd15").block("denoiser", "input_blocks.4.1.proj_in") == "IN04"
    assert archs.get("sd15").block("denoiser", "middle_block.1.proj_in") == "MID"
    assert archs.get("sd15").block("denoiser", "time_embed.0") is None
    assert archs.get("flux").block("denoiser", "double_blocks.7.img_attn.qkv") == "D07"
    assert archs.get("flux").block("denoiser", "final_layer.linear") == "OUT"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_weights": {"IN99": 1.0}}, "IN99"),
        ({"block_weights": [1.0, 2.0, 3.0]}, "vector of 3"),
        ({"component_weights": {"unet": 1.0}}, "unet"),
        ({"component_weights": [{}, {}, {}]}, "3 sets"),
    ],
)
def test_what_names_nothing_is_refused(pair: tuple[lt.Adapter, lt.Adapter], options: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        lt.merge(list(pair), **options)


def test_the_command_line_spells_them(pair: tuple[lt.Adapter, lt.Adapter], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from loratools.cli import cli

    output = tmp_path / "m.safetensors"
    arguments = [
        "merge",
        pair[0].path,
        pair[1].path,
        "-o",
        str(output),
        "--component-weights",
        "denoiser=0.5",
    ]
    done = CliRunner().invoke(cli, [*arguments, "--block-weights", "BASE=0.25", "--block-weights", ""])
    assert done.exit_code == 0, done.output
    expected = lt.merge(list(pair), component_weights={"denoiser": 0.5}, block_weights=[{"BASE": 0.25}, {}])
    again = lt.load(output)
    for target, module in expected.modules.items():
        error = (again.modules[target].delta() - module.delta()).norm() / module.delta().norm()
        assert float(error) < 1e-5
    wrong = CliRunner().invoke(cli, [*arguments, "--block-weights", "IN04"])
    assert wrong.exit_code == 2
