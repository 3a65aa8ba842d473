"""Layouts with one name for what transformers calls in several ways: the conversion is proven all the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from loratools.errors import LayoutError
from loratools.formats import get
from loratools.ops import _reread, files
from loratools.ops.convert import convert_file
from tests.ops.test_gguf_convert import base_of, peft_of

LAYER = "layers.0.self_attn.q_proj"


def under(folder: Path, head: str) -> Path:
    """A PEFT adapter of a model whose layers' names begin with something else."""
    path = peft_of(folder)
    file = path / "adapter_model.safetensors"
    stem = "base_model.model."
    save_file(
        {stem + head + key.removeprefix(f"{stem}model."): each for key, each in load_file(file).items()}, file
    )
    return path


def changes(path: Path) -> dict[str, np.ndarray]:
    """ΔW by the last four words of the modules' names, from the factors alone."""
    found = {}
    for target, module in files.load(path).modules.items():
        up, down = (module.factors[role].load().double().numpy() for role in ("up", "down"))
        found[".".join(target.path.split(".")[-4:])] = module.scale * (up @ down)
    return found


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        ("", "gguf"),
        ("model.language_model.", "gguf"),
        ("language_model.model.", "gguf"),
        ("", "torchtune"),
    ],
)
def test_other_outer_names_are_converted_and_told(head: str, layout: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source, base = under(tmp_path / "in", head), base_of(tmp_path / "base")
    output = tmp_path / ("out.gguf" if layout == "gguf" else "out")
    report = convert_file(source, output, to=layout, base=base)
    assert report.error == 0.0
    (note,) = [each for each in report.notes if "does not keep names whole" in each]
    assert f"{head}layers.0." in note
    assert "will be read as model.layers.0." in note
    assert "(4 modules)" in note
    convert_file(output, tmp_path / "back", to="peft", base=base)
    first, last = changes(source), changes(tmp_path / "back")
    assert first.keys() == last.keys()
    assert all(np.allclose(last[path], first[path], rtol=1e-12, atol=0) for path in first)


def test_usual_names_are_not_spoken_of(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    report = convert_file(
        peft_of(tmp_path / "in"), tmp_path / "out.gguf", to="gguf", base=base_of(tmp_path / "base")
    )
    assert not [note for note in report.notes if "names" in note]


def test_bert_by_itself_and_inside_others(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    spelt = set()
    for number, head in enumerate(("", "bert.", "roberta.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        stem = f"base_model.model.{head}encoder.layer.0.attention.self.query"
        factors = load_file(peft_of(tmp_path / f"any{number}") / "adapter_model.safetensors")
        some = "base_model.model.model.layers.0.mlp.down_proj"
        for role in ("A", "B"):
            factors[f"{stem}.lora_{role}.weight"] = factors[f"{some}.lora_{role}.weight"]
        kept = {key: each.clone() for key, each in factors.items() if key.startswith(stem)}
        save_file(kept, folder / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["query"]}
        (folder / "adapter_config.json").write_text(json.dumps(said))
        report = convert_file(
            folder, tmp_path / f"{number}.gguf", to="llama.cpp", base=base_of(tmp_path / f"b{number}", "bert")
        )
        assert report.error == 0.0
        spelt.add(tuple(each.key for each in report.tensors))
    assert spelt == {("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b")}


@pytest.mark.parametrize(("layout", "family"), [("gguf", "llama"), ("torchtune", "")])
def test_two_modules_of_one_name_are_refused(layout: str, family: str) -> None:
    with pytest.raises(LayoutError, match=r"one name for model\.layers.*Choose another layout") as refused:
        _reread.names([f"model.{LAYER}", LAYER], get(layout), family)
    assert refused.value.keys == (f"model.{LAYER}", LAYER)


def test_layouts_that_keep_names_rename_nothing() -> None:
    assert _reread.names([LAYER, f"model.{LAYER}"], get("peft"), "") == {}
