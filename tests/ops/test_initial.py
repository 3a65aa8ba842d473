"""Adapters of a base that their initialisation has changed, as plain LoRA for the base as it was published."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import LoraError, OptionError, ShapeError, UnsupportedKindError
from loratools.ops.bake import bake
from loratools.ops.convert import convert_file
from loratools.ops.inspect import info
from tests.cli.running import invoke

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def pair(folder: Path, **options: Any) -> tuple[Path, Path]:
    """An adapter as trained, and its factors before."""
    trained = make.peft(folder / "trained", seed=1, **options).path
    return trained, make.peft(folder / "pissa_init", seed=2, **options).path


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    return content


def edit(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **fields}), "utf-8")


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {target.path: module.delta() for target, module in lt.load(folder).modules.items()}


PATTERNS = {
    "ranks": {"model.layers.0.mlp.down_proj": 2},
    "alphas": {"model.layers.1.self_attn.q_proj": 3},
}


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["one-rank", "patterns"])
def test_the_difference_is_exact(method: str, rslora: bool, options: dict[str, Any], tmp_path: Path) -> None:
    said = {"init_lora_weights": method, "use_rslora": rslora}
    trained, initial = pair(tmp_path, config=said, **options)
    report = convert_file(trained, tmp_path / "out", to="peft", initial=initial)
    before, begun, after = deltas(trained), deltas(initial), deltas(tmp_path / "out")
    assert before.keys() == after.keys()
    for path, delta in after.items():
        torch.testing.assert_close(delta, before[path] - begun[path], rtol=1e-5, atol=1e-6)
    old, new = lt.load(trained), lt.load(tmp_path / "out")
    for target, module in new.modules.items():
        assert module.rank == 2 * (old.modules[target].rank or 0)
        assert math.isclose(module.scale, old.modules[target].scale, rel_tol=1e-12)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True
    assert not any("relative to the base" in said for said in new.notes)
    assert any(method.partition("_niter")[0] in said for said in report.notes)


def test_the_factors_are_stacked_bit_by_bit(tmp_path: Path) -> None:
    trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"}, dtype=torch.bfloat16)
    convert_file(trained, tmp_path / "out", to="peft", initial=initial)
    old, first, new = (load_file(each / WEIGHTS) for each in (trained, initial, tmp_path / "out"))
    assert old.keys() == new.keys()
    for key, tensor in new.items():
        axis = 0 if "lora_A" in key else 1
        begun = first[key] if axis == 0 else -first[key]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.cat([old[key], begun], dim=axis)), key


def test_it_goes_into_other_layouts(tmp_path: Path) -> None:
    trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"})
    convert_file(trained, tmp_path / "out.safetensors", to="loralib", initial=initial)
    before, begun, after = deltas(trained), deltas(initial), deltas(tmp_path / "out.safetensors")
    for path, delta in after.items():
        torch.testing.assert_close(delta, before[path] - begun[path], rtol=1e-5, atol=1e-6)


def test_modules_that_began_at_zero_stay_as_they_are(tmp_path: Path) -> None:
    trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"})
    tensors = load_file(initial / WEIGHTS)
    still = next(key for key in tensors if "down_proj.lora_B" in key)
    tensors[still].zero_()
    save_file(tensors, initial / WEIGHTS)
    convert_file(trained, tmp_path / "out", to="peft", initial=initial)
    old, new = lt.load(trained), lt.load(tmp_path / "out")
    path = still.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    for target, module in new.modules.items():
        assert (module.rank == old.modules[target].rank) == (target.path == path)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"}, dora=True)
    convert_file(trained, tmp_path / "out", to="peft", initial=initial)
    old, first, new = lt.load(trained), lt.load(initial), lt.load(tmp_path / "out")
    for target, module in new.modules.items():
        before, begun = old.modules[target], first.modules[target]
        assert before.shape is not None
        published = torch.randn(before.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        rest = published - begun._replace(magnitude=None).delta().double()
        found = published + module.delta(published).double()
        torch.testing.assert_close(found, rest + before.delta(rest).double(), rtol=1e-5, atol=1e-5)


class TestWrongFactors:
    def test_the_adapters_own(self, tmp_path: Path) -> None:
        trained, _ = pair(tmp_path, config={"init_lora_weights": "pissa"})
        with pytest.raises(OptionError, match="nothing would be left"):
            convert_file(trained, tmp_path / "out", to="peft", initial=trained)
        assert not (tmp_path / "out").exists()

    def test_of_other_modules(self, tmp_path: Path) -> None:
        trained, _ = pair(tmp_path, config={"init_lora_weights": "pissa"})
        other = make.peft(tmp_path / "other", make.LLAMA[:1]).path
        with pytest.raises(OptionError, match="not among the initial factors"):
            convert_file(trained, tmp_path / "out", to="peft", initial=other)
        with pytest.raises(OptionError, match="are not in the adapter"):
            convert_file(other, tmp_path / "out", to="peft", initial=trained)

    def test_of_another_scale(self, tmp_path: Path) -> None:
        trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"})
        edit(initial, lora_alpha=config_of(initial)["lora_alpha"] * 2)
        with pytest.raises(ShapeError, match="scaled by"):
            convert_file(trained, tmp_path / "out", to="peft", initial=initial)

    def test_of_another_width(self, tmp_path: Path) -> None:
        trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"})
        tensors = load_file(initial / WEIGHTS)
        wide = {key: torch.cat([t, t], dim=1) if "lora_A" in key else t for key, t in tensors.items()}
        save_file(wide, initial / WEIGHTS)
        with pytest.raises(ShapeError, match="initial factors are for a weight of shape"):
            convert_file(trained, tmp_path / "out", to="peft", initial=initial)

    def test_that_are_not_there(self, tmp_path: Path) -> None:
        trained, _ = pair(tmp_path, config={"init_lora_weights": "pissa"})
        found = invoke("convert", trained, "-o", tmp_path / "out", "--initial", tmp_path / "none")
        assert found.exit_code != 0
        assert "none" in found.stderr


def test_where_the_initial_factors_lie_is_said(tmp_path: Path) -> None:
    trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"})
    assert any(str(initial) in said for said in info(trained, norms=False).warnings)
    report = convert_file(trained, tmp_path / "out", to="peft", dtype="float16")
    assert any("--initial" in said for said in report.notes)
    shutil.rmtree(initial)
    assert not any("--initial" in said for said in info(trained, norms=False).warnings)


def test_a_bake_names_the_way_out(tmp_path: Path) -> None:
    trained, _ = pair(tmp_path, config={"init_lora_weights": "olora"})
    base = tmp_path / "base.safetensors"
    save_file({f"{path}.weight": torch.zeros(shape) for path, shape in make.LLAMA}, base)
    with pytest.raises(UnsupportedKindError, match=r"--initial DIR.*olora_init"):
        bake(base, [trained], tmp_path / "out.safetensors")


def test_another_layout_does_not_forget_it(tmp_path: Path) -> None:
    trained, initial = pair(tmp_path, config={"init_lora_weights": "pissa"}, rank=4, alpha=4)
    convert_file(trained, tmp_path / "out.safetensors", to="loralib")
    with pytest.raises(LoraError, match="init_lora_weights is pissa"):
        lt.merge([lt.load(tmp_path / "out.safetensors")])
    convert_file(tmp_path / "out.safetensors", tmp_path / "plain.safetensors", initial=initial)
    assert lt.merge([lt.load(tmp_path / "plain.safetensors")]).modules


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference results are not there")
@pytest.mark.parametrize("case", ["peft_convert__pissa_to_lora", "peft_convert__olora_to_lora"])
def test_as_peft_converts_it(case: str, tmp_path: Path) -> None:
    folder = ORACLE / case
    found = invoke(
        *("convert", folder / "input/trained", "-o", tmp_path / "out", "--initial", folder / "input/initial")
    )
    assert found.exit_code == 0, found.stderr
    wanted, ours = load_file(folder / "expected/converted" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert wanted.keys() == ours.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0)
    peers = config_of(folder / "expected/converted")
    config = config_of(tmp_path / "out")
    assert {key: config[key] for key in ("r", "lora_alpha", "init_lora_weights")} == {
        key: peers[key] for key in ("r", "lora_alpha", "init_lora_weights")
    }
    stated = load_file(folder / "expected/delta.safetensors")
    for path, delta in deltas(tmp_path / "out").items():
        key = next(key for key in stated if path in key)
        torch.testing.assert_close(delta, stated[key].float(), rtol=1e-4, atol=1e-5)
