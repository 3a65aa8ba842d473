"""What adapter_config.json may say: fields that change what the factors mean, and values that cannot be true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories as make
import pytest
import torch
from safetensors.torch import save_file

import loratools as lt
from loratools.errors import LoraError, MalformedFileError, UnsupportedKindError
from loratools.ops.bake import bake
from loratools.ops.convert import convert_file
from loratools.ops.inspect import info

CONFIG = "adapter_config.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {f"{path}.weight": torch.randn(shape, generator=generator) for path, shape in make.LLAMA}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    return content


def edit(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **fields}), "utf-8")


class TestNoConstantChange:
    @pytest.mark.parametrize(
        "fields",
        [
            {"alora_invocation_tokens": [5, 6]},
            {"arrow_config": {"top_k": 2}},
            {"use_qalora": True, "qalora_group_size": 8},
            {"layer_replication": [[0, 2], [1, 2]]},
            {"init_lora_weights": "corda"},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_it_is_said_kept_and_refused(self, fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a", config=fields)
        field = next(iter(fields))
        assert any(said.startswith(field) for said in info(made.path, norms=False).warnings)
        with pytest.raises(UnsupportedKindError, match=field):
            bake(base, [made.path], tmp_path / "out.safetensors")
        with pytest.raises(UnsupportedKindError, match=field):
            lt.merge([lt.load(made.path), lt.load(make.peft(tmp_path / "b").path)])
        convert_file(made.path, tmp_path / "again", to="peft", dtype="float16")
        assert fields.items() <= config_of(tmp_path / "again").items()
        convert_file(made.path, tmp_path / "out.safetensors", to="loralib")
        with pytest.raises(UnsupportedKindError, match=field):
            bake(base, [tmp_path / "out.safetensors"], tmp_path / "baked.safetensors")

    @pytest.mark.parametrize(
        "fields",
        [{"init_lora_weights": start} for start in ("gaussian", "eva", "orthogonal", "mica", True, False)]
        + [{"velora_config": {"num_groups": 4}}, {"monteclora_config": {"num_samples": 2}}],
        ids=str,
    )
    def test_what_changes_nothing_is_not_refused(
        self, fields: dict[str, Any], base: Path, tmp_path: Path
    ) -> None:
        made = make.peft(tmp_path / "a", config=fields)
        assert not lt.load(made.path).notes
        assert bake(base, [made.path], tmp_path / "out.safetensors").tensors


class TestVariantsOfLora:
    def test_blocks_on_a_diagonal(self, tmp_path: Path) -> None:
        up, down = torch.randn(8, 4), torch.randn(4, 3)
        blocks = {"nblocks": 2, "target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_proj"]}
        folder = _lora(tmp_path / "a", "model.layers.0.mlp.down_proj", up, down, use_bdlora=blocks)
        (module,) = lt.load(folder).modules.values()
        whole = torch.zeros(4, 6)
        whole[:2, :3], whole[2:, 3:] = down[:2], down[2:]
        assert (module.kind, module.shape, module.rank) == ("bdlora", (8, 6), 4)
        torch.testing.assert_close(module.delta(), 2 * up @ whole)
        convert_file(folder, tmp_path / "plain.safetensors", to="loralib", as_kind="lora")
        (again,) = lt.load(tmp_path / "plain.safetensors").modules.values()
        torch.testing.assert_close(again.delta(), module.delta(), rtol=1e-5, atol=1e-5)

    def test_blocks_are_written_as_they_came(self, tmp_path: Path) -> None:
        blocks = {"nblocks": 2, "target_modules_bd_b": ["q_proj"]}
        name = "model.layers.0.self_attn.q_proj"
        folder = _lora(tmp_path / "a", name, torch.randn(8, 2), torch.randn(4, 6), use_bdlora=blocks)
        convert_file(folder, tmp_path / "b", to="peft", dtype="float64")
        assert config_of(tmp_path / "b")["use_bdlora"] == blocks
        (one,), (other,) = (lt.load(each).modules.values() for each in (folder, tmp_path / "b"))
        assert other.kind == "bdlora"
        torch.testing.assert_close(one.delta(), other.delta())
        with pytest.raises(LoraError, match="up_blocks of BD-LoRA"):
            convert_file(folder, tmp_path / "c.safetensors", to="loralib")

    @pytest.mark.parametrize("count", [3, 0, 4])
    def test_a_number_of_blocks_that_does_not_fit(self, count: int, tmp_path: Path) -> None:
        blocks = {"nblocks": count, "target_modules_bd_b": ["q_proj"]}
        name = "model.layers.0.self_attn.q_proj"
        folder = _lora(tmp_path / "a", name, torch.randn(8, 2), torch.randn(4, 6), use_bdlora=blocks)
        (module,) = lt.load(folder).modules.values()
        with pytest.raises(LoraError, match="blocks"):
            module.delta()

    def test_kasa_takes_the_smallest_components_away(self, tmp_path: Path) -> None:
        up, down, diagonal = torch.randn(8, 2), torch.randn(2, 6), torch.randn(2)
        name = "model.layers.0.self_attn.q_proj"
        folder = _lora(
            tmp_path / "a", name, up, down, kasa_config={"beta": 1e-4}, more={"lora_diag": diagonal}
        )
        (module,) = lt.load(folder).modules.values()
        weight = torch.randn(8, 6, dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        kept = left[:, :4] * values[:4] @ right[:4]
        wanted = kept + 4 * (up * diagonal).double() @ down.double()
        torch.testing.assert_close(weight + module.delta(weight).double(), wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(UnsupportedKindError, match="depends on the base"):
            module.delta()

    def test_kasa_needs_a_weight_wider_than_its_rank(self, tmp_path: Path) -> None:
        folder = _lora(
            tmp_path / "a",
            "model.layers.0.self_attn.q_proj",
            torch.randn(8, 2),
            torch.randn(2, 2),
            kasa_config={"beta": 1e-4},
            more={"lora_diag": torch.randn(2)},
        )
        (module,) = lt.load(folder).modules.values()
        with pytest.raises(LoraError, match="components of a weight"):
            module.delta(torch.randn(8, 2))

    def test_kasa_becomes_lora_with_its_base(self, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.q_proj"
        folder = _lora(
            tmp_path / "a",
            name,
            torch.randn(8, 2),
            torch.randn(2, 6),
            kasa_config={"beta": 1e-4},
            more={"lora_diag": torch.randn(2)},
        )
        weight = torch.randn(8, 6)
        save_file({f"{name}.weight": weight}, tmp_path / "base.safetensors")
        report = convert_file(
            folder,
            tmp_path / "plain.safetensors",
            to="loralib",
            as_kind="lora",
            base=tmp_path / "base.safetensors",
        )
        assert [each.rank for each in report.conversions] == [4]
        (before,) = lt.load(folder).modules.values()
        (after,) = lt.load(tmp_path / "plain.safetensors").modules.values()
        torch.testing.assert_close(after.delta(), before.delta(weight), rtol=1e-4, atol=1e-5)


def _lora(
    folder: Path,
    name: str,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    more: dict[str, torch.Tensor] | None = None,
    **fields: Any,
) -> Path:
    """A PEFT folder of one module, with alpha at twice its rank."""
    folder.mkdir()
    stem = f"base_model.model.{name}"
    rank = down.shape[0]
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    tensors |= {f"{stem}.{key}": tensor for key, tensor in (more or {}).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [name], **fields}
    if "kasa_config" in fields:
        config["lora_alpha"] = 4 * rank
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    return folder


class TestContradictions:
    def test_another_rank_is_said_and_refused_where_it_counts(self, base: Path, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a", rank=4)
        edit(made.path, r=8)
        assert any("says rank 8" in said for said in info(made.path, norms=False).warnings)
        for work in (
            lambda: bake(base, [made.path], tmp_path / "out.safetensors"),
            lambda: lt.merge([lt.load(made.path)]),
        ):
            with pytest.raises(MalformedFileError, match=r"says rank 8 .* have rank 4"):
                work()
        convert_file(made.path, tmp_path / "true", to="peft")
        assert config_of(tmp_path / "true")["r"] == 4
        assert bake(base, [tmp_path / "true"], tmp_path / "out.safetensors").tensors

    def test_a_resized_adapter_in_memory_is_no_contradiction(self, tmp_path: Path) -> None:
        small = lt.resize(lt.load(make.peft(tmp_path / "a", rank=4).path), rank=2)
        assert lt.merge([small, small]).modules

    @pytest.mark.parametrize(
        ("stated", "off"),
        [
            (["q_proj"], True),
            (r".*\.q_proj", True),
            (r".*_proj", False),
            ("all-linear", False),
            (None, False),
        ],
    )
    def test_modules_that_are_not_targeted(self, stated: Any, off: bool, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a")
        edit(made.path, target_modules=stated)
        said = [each for each in lt.load(made.path).notes if "target_modules" in each]
        assert bool(said) == off
        if off:
            assert "first: model.layers" in said[0]


class TestMalformed:
    @pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
    def test_a_pattern_that_does_not_compile(self, field: str, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a")
        edit(made.path, **{field: {"(q_proj": 3}})
        (said,) = [each for each in lt.load(made.path).notes if "regular expression" in each]
        assert said.startswith(field)
        assert "'(q_proj'" in said

    def test_targets_that_do_not_compile(self, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a")
        edit(made.path, target_modules="[q")
        assert any(said.startswith("target_modules") for said in lt.load(made.path).notes)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("r", "8"),
            ("r", True),
            ("lora_alpha", "16"),
            ("lora_alpha", [16]),
            ("use_rslora", "false"),
            ("use_dora", 1),
            ("rank_pattern", [4]),
            ("rank_pattern", {"q_proj": "4"}),
            ("alpha_pattern", {"q_proj": None}),
            ("target_modules", 3),
        ],
    )
    def test_a_value_of_another_type(self, field: str, value: Any, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a")
        edit(made.path, **{field: value})
        with pytest.raises(
            MalformedFileError, match=rf"{field} of adapter_config.json is .*expected"
        ) as refused:
            lt.load(made.path)
        assert refused.value.keys == (field,)

    @pytest.mark.parametrize("text", ["{", "[]", '"LORA"', ""])
    def test_what_is_no_object(self, text: str, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a")
        (made.path / CONFIG).write_text(text, "utf-8")
        with pytest.raises(MalformedFileError, match="configuration") as refused:
            lt.load(made.path)
        assert CONFIG in str(refused.value)

    def test_a_missing_configuration_is_explained(self, tmp_path: Path) -> None:
        made = make.peft(tmp_path / "a")
        (made.path / CONFIG).unlink()
        assert any("a scale of 1 is assumed" in said for said in lt.load(made.path).notes)


def test_fields_that_nobody_knows_are_kept(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", config={"someones_field": {"deep": [1]}})
    convert_file(made.path, tmp_path / "b", to="peft", dtype="float16")
    assert config_of(tmp_path / "b")["someones_field"] == {"deep": [1]}
    convert_file(made.path, tmp_path / "c.safetensors", to="loralib")
    convert_file(tmp_path / "c.safetensors", tmp_path / "d", to="peft")
    assert config_of(tmp_path / "d")["someones_field"] == {"deep": [1]}
