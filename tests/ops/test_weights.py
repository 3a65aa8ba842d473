"""Multipliers per component and per block act on ΔW of what they name, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import factories as make
import numpy as np
import pytest

import loratools as lt
from loratools import archs
from loratools.archs._blocks import PRESETS, preset
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


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> lt.Adapter:
    """A language model's adapter of two layers, with every path of the form model.layers.N.…"""
    return lt.load(make.peft(tmp_path_factory.mktemp("decoder") / "a").path)


def layer_of(target: lt.Target) -> int:
    return int(target.path.split("layers.")[1].split(".")[0])


def test_a_pattern_weighs_what_its_regular_expression_finds(decoder: lt.Adapter) -> None:
    found = ratio(lt.merge([decoder], weights=[2.0], weight_for={r"q_proj$": -0.5}), decoder)
    hit = [target for target in decoder.modules if target.path.endswith("q_proj")]
    assert 0 < len(hit) < len(decoder.modules)
    for target in decoder.modules:
        assert found[str(target)] == pytest.approx(-1.0 if target in hit else 2.0, abs=1e-4)


@pytest.mark.parametrize("gradient", ["0.2→1.2", "0.2..1.2", "0.2->1.2", " 0.2 -> 1.2 "])
def test_a_gradient_goes_over_the_layers(decoder: lt.Adapter, gradient: str) -> None:
    layered = [target for target in decoder.modules if "layers." in target.path]
    assert {layer_of(target) for target in layered} >= {0, 1}
    found = ratio(lt.merge([decoder], weight_for={"layers.0-4": gradient}), decoder)
    for target in layered:
        assert found[str(target)] == pytest.approx(0.2 + 0.25 * layer_of(target), abs=1e-4)


def test_of_several_patterns_the_last_counts_and_counts_once(decoder: lt.Adapter) -> None:
    patterns = {"layers.0-1": 0.5, "layers.1-1.self_attn": 3.0, "2:layers": 7.0}
    merged, report = _merge([decoder, decoder], weights=[1.0, 0.0], weight_for=patterns)
    found = ratio(merged, decoder)
    for target in decoder.modules:
        attention = "layers.1.self_attn" in target.path
        assert found[str(target)] == pytest.approx(3.0 if attention else 0.5, abs=1e-4)
    counts = {row["name"]: row["modules"] for row in report.inputs[0]["multipliers"]}
    special = sum("layers.1.self_attn" in target.path for target in decoder.modules)
    assert counts == {"layers.0-1": len(decoder.modules) - special, "layers.1-1.self_attn": special}
    assert report.inputs[1]["multipliers"][-1] == {
        "by": "pattern",
        "name": "2:layers",
        "weight": "7.0",
        "modules": len(decoder.modules),
    }


def _merge(adapters: list[lt.Adapter], **options: object):
    from loratools.ops.merge import merge

    return merge(adapters, **options)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("layers.11", 11),
        ("model.layers.12.mlp", None),
        ("model.sublayers.3.mlp", None),
        ("model.layers.31.mlp", None),
    ],
)
def test_a_range_takes_whole_segments(path: str, layer: int | None) -> None:
    from loratools.ops._weight_patterns import rules

    (rule,) = rules({"layers.0-11": "0..11"})
    assert rule.weight(0, path) == layer


def test_flattened_names_have_layers_too() -> None:
    from loratools.ops._weight_patterns import rules

    (rule,) = rules({"layers_2-4": 0.5})
    assert [rule.weight(0, f"model_layers_{layer}_mlp") for layer in (1, 2, 4, 24)] == [None, 0.5, 0.5, None]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"nowhere": 1.0, "layers": 1.0}, r"1 of 2 weight patterns match no module \(nowhere\)"),
        ({"layers.40-50": 1.0}, "match no module"),
        ({"attn(": 1.0}, "no regular expression"),
        ({"attn": "0..1"}, "the pattern has no layers"),
        ({"layers.3-3": "0..1"}, "go from 3 to 3"),
        ({"layers.9-3": 1.0}, "go from 9 to 3"),
        ({"layers.0-3": "0..1..0"}, "'0..1..0'"),
        ({"layers": "nan"}, "'nan'"),
        ({"layers": ""}, "''"),
        ({"2:layers": 1.0}, "for input 2"),
        ({"0:layers": 1.0}, "for input 0"),
        ({"": 1.0}, "is empty"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(decoder: lt.Adapter, patterns: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        lt.merge([decoder], weight_for=patterns)


# As the extension's own vectors read, after BASE: of 17 numbers (its presets), and of 12.
VECTORS_17 = {
    "INS": "1110000000000000",
    "IND": "0001110000000000",
    "INALL": "1111110000000000",
    "MIDD": "0001111111100000",
    "OUTD": "0000000111100000",
    "OUTS": "0000000000011111",
    "OUTALL": "0000000111111111",
}
VECTORS_12 = {
    "INS": "11000000000",
    "IND": "00110000000",
    "INALL": "11110000000",
    "MIDD": "00111111000",
    "OUTD": "00000111000",
    "OUTS": "00000000111",
    "OUTALL": "00000111111",
}


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
def test_presets_are_the_vectors_of_the_extension(arch: str) -> None:
    vectors = archs.get(arch).vectors
    longest = vectors[max(vectors)]
    for name, weight in (("ALL", 1.0), ("ALL0.5", 0.5), ("NONE", 0.0)):
        assert preset(name, vectors) == dict.fromkeys(longest, weight)
    length, written = {"sd15": (17, VECTORS_17), "sdxl": (12, VECTORS_12), "flux": (0, {})}[arch]
    for name in set(PRESETS) - {"ALL", "ALL0.5", "NONE"}:
        found = preset(name, vectors)
        if arch == "flux":
            assert found is None
            continue
        expected = dict(zip(vectors[length], map(float, "1" + written[name]), strict=True))
        assert found == {label: expected.get(label, 0.0) for label in longest}


def test_a_preset_of_another_architecture_is_refused(decoder: lt.Adapter) -> None:
    with pytest.raises(OptionError, match="no preset of block weights called 'MIDD'"):
        lt.merge([decoder], block_weights="MIDD")


def test_a_preset_leaves_out_what_it_does_not_keep(pair: tuple[lt.Adapter, lt.Adapter]) -> None:
    one, _ = pair
    found = ratio(lt.merge([one], block_weights="OUTALL"), one)
    table = archs.get("sdxl")
    labels = {str(target): table.block(target.component, target.path) for target in one.modules}
    assert any(label == "BASE" for label in labels.values())
    for target, label in labels.items():
        kept = label is None or label == "BASE" or label.startswith("OUT")
        assert found[target] == pytest.approx(1.0 if kept else 0.0, abs=1e-4)
