"""What adapters of one make share must not show: alone or together, each is packed to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.errors import OptionError
from loratools.ops import _pack_plan, _pack_planner, _pack_twins, files
from loratools.ops._pack_slots import Slots


@pytest.fixture
def readings(monkeypatch):
    """The files whose names were worked out."""
    found: list[str] = []
    real = files.named

    def named(opened, **options):
        found.append(Path(opened.path).parent.name + "/" + Path(opened.path).name)
        return real(opened, **options)

    monkeypatch.setattr(files, "named", named)
    return found


def tensors_of(pack: Path, name: str) -> dict[str, bytes]:
    place = pack / "adapters" / name
    inside = place.iterdir() if place.is_dir() else [place]
    return {each.name: each.read_bytes() for each in inside}


@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_alike_adapters_are_named_once_and_packed_as_they_are_alone(tmp_path, readings, layout):
    lib = tmp_path / "lib"
    for number in range(3):
        targets = ["q_proj", "v_proj", "down_proj"]
        config = {"target_modules": targets[number:] + targets[:number]}
        make.peft(lib / f"a{number}", seed=number, dtype=torch.bfloat16, config=config)
    make.peft(lib / "b", seed=5, dtype=torch.bfloat16, alpha=7.0)
    report = lt.pack([lib], tmp_path / "out", ranks=[8], layout=layout, threads=1)
    assert [each.split("/")[0] for each in readings] == ["a0", "b"]
    for entry in report.adapters:
        alone = lt.pack([lib / entry.name], tmp_path / entry.name, ranks=[8], layout=layout)
        assert alone.adapters[0] == entry
        name = Path(entry.path).name
        assert tensors_of(tmp_path / entry.name, name) == tensors_of(tmp_path / "out", name)
    assert len({entry.hash for entry in report.adapters}) == 4


@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_an_alpha_in_the_data_is_part_of_what_is_shared(tmp_path, readings, layout):
    lib = tmp_path / "lib"
    first = make.kohya(lib / "a.safetensors", arch="sd15", alpha=2.0)
    twice = {key: value * 2 if key.endswith("alpha") else value for key, value in first.tensors.items()}
    other = {key: value if key.endswith("alpha") else value * 3 for key, value in first.tensors.items()}
    make.write_safetensors(lib / "b.safetensors", twice, {})
    make.write_safetensors(lib / "c.safetensors", first.tensors, {})
    make.write_safetensors(lib / "d.safetensors", other, {})
    report = lt.pack([lib], tmp_path / "out", layout=layout, duplicate_error=0.0, threads=1)
    assert len(readings) == len({(lib / f"{name}.safetensors").stat().st_size for name in "ac"}) + 1
    assert [each.scales for each in report.adapters] == [(0.5, 0.5), (1.0, 1.0), (0.5, 0.5), (0.5, 0.5)]
    for entry in report.adapters:
        found = make.deltas_of(lt.load(tmp_path / "out" / entry.path))
        make.assert_close(found, make.deltas_of(lt.load(entry.source)), make.TOLERANCE["F16"])


def test_a_document_that_depends_on_values_is_made_for_each(tmp_path, monkeypatch):
    for number in range(2):
        make.peft(tmp_path / f"lib/a{number}", seed=number)
    real = formats.document

    def curious(adapter, layout, form):
        document = real(adapter, layout, form)
        first = document.tensors[0].load().flatten()[0]
        return document._replace(metadata={**document.metadata, "first": f"{float(first):.6f}"})

    monkeypatch.setattr(formats, "document", curious)
    report = lt.pack([tmp_path / "lib"], tmp_path / "out")
    said = [lt.load(tmp_path / "out" / each.path).metadata["first"] for each in report.adapters]
    assert len(set(said)) == 2


def test_a_plan_that_asked_for_much_of_the_data_serves_no_other_file():
    slots = Slots([(0, 4), (4, 8)], memoryview(b"abcdefgh"))
    assert slots.slots[1].raw() == b"efgh"
    assert slots.fix(4)
    assert slots.agrees(memoryview(b"____efgh"))
    assert not slots.agrees(memoryview(b"abcd____"))
    slots.bind(memoryview(b"12345678"))
    assert [slot.raw() for slot in slots.slots] == [b"1234", b"5678"]
    assert not slots.fix(4)


def test_only_the_last_plans_are_remembered(tmp_path, readings, monkeypatch):
    monkeypatch.setattr(_pack_planner, "_PLANS", 2)
    for rank in (1, 2, 3):
        make.peft(tmp_path / f"a{rank}", rank=rank)
    planner = _pack_planner.Planner(_pack_plan.Request("peft"))
    for rank in (1, 2, 1, 3, 1, 2):
        assert planner.planned(str(tmp_path / f"a{rank}/adapter_model.safetensors")).plan.rank == rank
    assert [each[:2] for each in readings] == ["a1", "a2", "a3", "a2"]


def test_another_configuration_is_another_plan(tmp_path):
    make.peft(tmp_path / "lib/a", seed=0, rank=4, alpha=4.0)
    made = make.peft(tmp_path / "lib/b", seed=1, rank=4, alpha=4.0)
    config = json.loads((tmp_path / "lib/b/adapter_config.json").read_text("utf-8"))
    (tmp_path / "lib/b/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}), "utf-8")
    report = lt.pack([tmp_path / "lib"], tmp_path / "out")
    assert [each.scales for each in report.adapters] == [(1.0, 1.0), (4.0, 4.0)]
    found = make.deltas_of(lt.load(tmp_path / "out/adapters/b"))
    make.assert_close(found, {key: 4 * value for key, value in made.deltas.items()}, make.TOLERANCE["F32"])


@pytest.mark.parametrize("first", ["a_other", "z_other"])
def test_values_that_are_no_numbers_are_told_wherever_they_stand(tmp_path, first):
    lib = tmp_path / "lib"
    other = (("model.layers.0.self_attn.q_proj", (24, 24)),)
    made = {
        "b_good": make.peft(lib / "b_good", seed=0),
        "c_nan": make.peft(lib / "c_nan", seed=1),
        first: make.peft(lib / first, seed=2, model=other),
        "zz_nan": make.peft(lib / "zz_nan", seed=3, model=other),
    }
    for name in ("c_nan", "zz_nan"):
        key = next(iter(made[name].tensors))
        broken = {**made[name].tensors, key: made[name].tensors[key] * float("inf")}
        make.write_safetensors(made[name].file, broken, {})
    with pytest.raises(OptionError, match="inputs do not fit"):
        lt.pack([lib], tmp_path / "out")
    report = lt.pack([lib], tmp_path / "out", skip_unfit=True)
    causes = {each.name: each.causes for each in report.unfit}
    for name in ("c_nan", "zz_nan"):
        assert any("NaN or Inf" in cause and str(made[name].file) in cause for cause in causes[name])
    # What does not fit says nothing of the base that the others are for.
    assert len(report.adapters) == 1
    assert (len(causes["zz_nan"]) == 2) == (first == "z_other")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_the_filter_lets_near_duplicates_through_and_little_else(dtype):
    generator = torch.Generator().manual_seed(11)
    twins = _pack_twins.Twins(None)
    limit = twins.limit(dtype, dtype)
    sketches = torch.randn(40, 1792, generator=generator, dtype=torch.float64).exp()
    near = far = 0
    for number, sketch in enumerate(sketches * torch.sign(torch.randn(40, 1792, generator=generator))):
        twins.add(str(number), "key", _pack_twins.marks(sketch), dtype)
        away = torch.randn(1792, generator=generator, dtype=torch.float64)
        away *= sketch.norm() / away.norm()
        for times in (0.0, 0.5, 1.0):
            marks = _pack_twins.marks(sketch + times * limit * away)
            near += str(number) in twins.candidates("key", marks, dtype)
            assert str(number) not in twins.candidates("other modules", marks, dtype)
        # Where 20 times the limit is no difference to speak of any more: an unrelated one.
        marks = _pack_twins.marks(sketch + 20 * limit * away if limit < 0.02 else away)
        far += str(number) in twins.candidates("key", marks, dtype)
    assert near == 120
    assert far == 0


def test_a_filter_of_another_limit(tmp_path):
    made = make.peft(tmp_path / "lib/a", seed=0)
    for name, times in (("b", 1.04), ("c", 1.3)):
        scaled = {key: value * times if "lora_B" in key else value for key, value in made.tensors.items()}
        make.peft(tmp_path / f"lib/{name}", seed=0)
        make.write_safetensors(tmp_path / f"lib/{name}/adapter_model.safetensors", scaled, {})
    for limit, kept in ((None, "abc"), (0.05, "ac"), (0.5, "a"), (0.0, "abc")):
        report = lt.pack([tmp_path / "lib"], tmp_path / "out", duplicate_error=limit, overwrite=True)
        assert "".join(each.name for each in report.adapters) == kept
