"""The public names: what a script does with them."""

from __future__ import annotations

from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt


def test_the_public_names_are_there() -> None:
    for name in lt.__all__:
        assert getattr(lt, name) is not None
    assert lt.__version__.count(".") == 2


def test_a_script_from_end_to_end(tmp_path: Path) -> None:
    style = make.kohya(tmp_path / "style.safetensors", "sdxl", seed=1, dtype=torch.float16)
    make.diffusers(tmp_path / "char.safetensors", "sdxl", seed=2)
    adapter = lt.load(style.path)
    merged = lt.merge(
        [adapter, lt.load(tmp_path / "char.safetensors")],
        weights=[0.8, 0.6],
        method="ties",
        density=0.3,
        rank=8,
    )
    size = lt.save(merged, tmp_path / "multi.safetensors", dtype="float16")
    assert size == (tmp_path / "multi.safetensors").stat().st_size
    found = lt.info(tmp_path / "multi.safetensors")
    assert found.arch == "sdxl"
    assert {module.rank for module in found.modules} == {8}
    # Two factors and an alpha each.
    assert found.dtypes == {"F16": 3 * len(found.modules)}
    target = next(iter(adapter.modules))
    delta = adapter.modules[target].delta()
    assert (delta.dtype, tuple(delta.shape)) == (torch.float32, adapter.modules[target].shape)


def test_paths_may_be_text_or_objects(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a")
    assert lt.load(str(made.path)).modules.keys() == lt.load(made.path).modules.keys()
    assert lt.load(made.file).modules.keys() == lt.load(made.path).modules.keys()
    assert lt.info(str(made.path)).layout == "peft"


def test_loading_changes_nothing_that_is_merged_afterwards(tmp_path: Path) -> None:
    """Factors share memory with the file: no operation may write to them."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    adapter = lt.load(made.path)
    before = {key: delta.copy() for key, delta in make.deltas_of(adapter).items()}
    lt.merge([adapter, adapter], weights=[0.5, -2], dtype="float16")
    lt.merge([adapter, adapter], method="ties", density=0.1)
    lt.save(adapter, tmp_path / "b.safetensors", layout="diffusers", dtype="bfloat16")
    make.assert_close(make.deltas_of(adapter), before, 1e-12)


def test_every_error_of_the_library_is_a_lora_error_and_a_builtin(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lt.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="no layout"):
        lt.save(lt.load(make.peft(tmp_path / "a").path), tmp_path / "b", layout="zzz")
    with pytest.raises(lt.LoraError):
        lt.merge([])


def test_options_are_the_methods_own(tmp_path: Path) -> None:
    adapter = lt.load(make.peft(tmp_path / "a").path)
    with pytest.raises(lt.LoraError, match="densty"):
        lt.merge([adapter], method="ties", densty=0.5)
