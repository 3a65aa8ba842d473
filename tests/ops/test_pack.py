"""Packs: one form, no duplicates, nothing lost, and the same bytes whatever interrupts them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import (
    LoraError,
    MalformedFileError,
    MissingFileError,
    NotAnAdapterError,
    OptionError,
    OutputExistsError,
    WriteError,
)
from loratools.ops import _pack_files, _pack_run

BASE = {"base_model_name_or_path": "some/base"}


def library(folder: Path, count: int = 3, **fields) -> Path:
    for number in range(count):
        make.peft(folder / f"a{number}", seed=number, **fields)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    }


def rotated(made: make.Made, path: Path, *, times: float = 1.0) -> Path:
    """A Kohya file with other factors of the same ΔW, or of a multiple."""
    tensors = dict(made.tensors)
    generator = torch.Generator().manual_seed(3)
    for key in made.tensors:
        if key.endswith("lora_up.weight"):
            down = key.replace("lora_up", "lora_down")
            rank = tensors[key].shape[1]
            turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
            up, own = tensors[key].double().flatten(1) @ turn, turn.T @ tensors[down].double().flatten(1)
            tensors[key] = (times * up).reshape(tensors[key].shape).to(tensors[key].dtype)
            tensors[down] = own.reshape(tensors[down].shape).to(tensors[down].dtype)
    make.write_safetensors(path, tensors, {})
    return path


def test_unpacking_gives_what_was_packed(tmp_path):
    made = make.peft(tmp_path / "lib/one", ranks={"model.layers.0.mlp.down_proj": 7}, dtype=torch.float16)
    report = lt.pack([tmp_path / "lib"], tmp_path / "out", ranks=[6, 16])
    (entry,) = report.adapters
    assert (entry.rank, entry.bucket, entry.dtype, entry.modules) == (7, 16, "F16", 5)
    packed = lt.load(tmp_path / "out" / entry.path)
    assert {(module.rank, module.scale) for module in packed.modules.values()} == {(16, 1.0)}
    lt.unpack(tmp_path / "out", tmp_path / "back")
    back = lt.load(tmp_path / "back/one")
    assert sorted(module.rank for module in back.modules.values()) == [4, 4, 4, 4, 7]
    make.assert_close(make.deltas_of(back), made.deltas, make.TOLERANCE["F16"])
    for target, module in back.modules.items():
        padded = packed.modules[target].factors
        assert torch.equal(module.factors["up"].load(), padded["up"].load()[:, : module.rank])
        assert not padded["up"].load()[:, module.rank :].any()


def test_scales_of_powers_of_two_are_folded_without_rounding(tmp_path):
    made = make.peft(tmp_path / "lib/one", rank=4, alpha=8.0, dtype=torch.bfloat16)
    report = lt.pack([tmp_path / "lib"], tmp_path / "out")
    assert not report.adapters[0].rounded
    assert report.adapters[0].scales == (2.0, 2.0)
    found = make.deltas_of(lt.load(tmp_path / "out/adapters/one"))
    for name, delta in made.deltas.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-6, atol=1e-7)
    make.peft(tmp_path / "lib/two", seed=1, rank=4, alpha=6.0, dtype=torch.bfloat16)
    again = lt.pack([tmp_path / "lib"], tmp_path / "out", overwrite=True)
    assert [each.rounded for each in again.adapters] == [False, True]
    assert any("1 of 2 adapters were rounded" in note for note in again.notes)


def test_one_adapter_in_five_spellings_is_kept_once(tmp_path):
    made = make.kohya(tmp_path / "lib/a_kohya.safetensors", arch="sd15", alpha=2.0)
    folder = tmp_path / "lib"
    lt.convert(made.path, folder / "b_diffusers.safetensors", to="diffusers")
    lt.convert(made.path, folder / "c_comfy.safetensors", to="comfy")
    lt.convert(made.path, folder / "d_folded.safetensors", to="kohya", fold=True)
    rotated(made, folder / "e_rotated.safetensors")
    rotated(made, folder / "f_near.safetensors", times=1.01)
    report = lt.pack([folder], tmp_path / "out", layout="kohya")
    assert [each.name for each in report.adapters] == ["a_kohya", "f_near"]
    assert [(each.name[0], each.of) for each in report.aliases] == [(letter, "a_kohya") for letter in "bcde"]
    assert all(each.error < 1e-2 for each in report.aliases)
    lt.unpack(tmp_path / "out", tmp_path / "back", names=["c_comfy"])
    make.assert_close(
        make.deltas_of(lt.load(tmp_path / "back/c_comfy.safetensors")), made.deltas, make.TOLERANCE["F16"]
    )
    everything = lt.pack([folder], tmp_path / "all", layout="kohya", duplicate_error=0.0)
    assert len(everything.adapters) == 6
    hashes = [each.hash for each in everything.adapters]
    assert hashes[0] == hashes[1] == hashes[2]
    assert hashes[0] != hashes[5]


def test_the_index_tells_of_every_adapter(tmp_path):
    library(tmp_path / "lib", config=BASE)
    report = lt.pack([tmp_path / "lib"], tmp_path / "out", dtype="bfloat16", ranks=[8])
    said = json.loads((tmp_path / "out/index.json").read_text("utf-8"))
    assert (said["format"], said["version"], said["layout"]) == ("loratools-pack", 1, "peft")
    for entry, each in zip(said["adapters"], report.adapters, strict=True):
        file = tmp_path / "out" / entry["path"] / "adapter_model.safetensors"
        assert entry["sha256"] == each.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert entry["source"] == str(tmp_path / "lib" / each.name / "adapter_model.safetensors")
        assert (entry["rank"], entry["bucket"], entry["dtype"], entry["base"]) == (4, 8, "BF16", "some/base")
        size = sum(file.stat().st_size for file in (tmp_path / "out" / entry["path"]).iterdir())
        assert entry["bytes"] == size
    assert lt.info(tmp_path / "out").type == "pack"


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(tmp_path, after):
    folder = library(tmp_path / "lib", 4)
    make.peft(folder / "z_same", seed=0)
    lt.pack([folder], tmp_path / "whole", ranks=[8])

    def failing(name: str, number: int, count: int) -> None:
        if number == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lt.pack([folder], tmp_path / "out", ranks=[8], resume=True, progress=failing)
    assert not (tmp_path / "out").exists()
    report = lt.pack([folder], tmp_path / "out", ranks=[8], resume=True)
    assert report.reused == after
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lib", "out", "whole"]


def test_what_has_changed_since_is_done_again(tmp_path, monkeypatch):
    folder = library(tmp_path / "lib", 3)
    make.peft(folder / "z_same", seed=0)
    monkeypatch.setattr(_pack_run.Run, "settle", lambda self, count: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lt.pack([folder], tmp_path / "out", resume=True)
    monkeypatch.undo()
    make.peft(folder / "a0", seed=9, rank=5)
    (tmp_path / ".out.work/pack/adapters/a1/adapter_model.safetensors").write_bytes(b"damaged")
    with open(tmp_path / ".out.work/journal", "a", encoding="utf-8") as journal:
        journal.write('01234567 ["adapter cut o')
    report = lt.pack([folder], tmp_path / "out", resume=True)
    assert report.reused == 1
    assert [each.name for each in report.adapters] == ["a0", "a1", "a2", "z_same"]
    lt.pack([folder], tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_interrupted_run_without_resume_leaves_nothing(tmp_path, monkeypatch):
    folder = library(tmp_path / "lib")
    monkeypatch.setattr(_pack_run.Run, "settle", lambda self, count: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lt.pack([folder], tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["lib"]


def test_what_does_not_fit_is_refused_by_name_or_listed(tmp_path):
    folder = library(tmp_path / "lib", 2)
    make.peft(folder / "dora", dora=True)
    make.peft(folder / "other_base", model=(("model.layers.0.self_attn.q_proj", (24, 24)),))
    (folder / "broken.safetensors").write_bytes(b"no tensors at all")
    make.write_safetensors(folder / "plain.safetensors", {"x": torch.zeros(3)}, {})
    nan = make.peft(folder / "nan", seed=4)
    key = next(iter(nan.tensors))
    make.write_safetensors(nan.file, {**nan.tensors, key: nan.tensors[key] * float("nan")}, {})
    make.peft(folder / "whole", seed=6, extra={"base_model.model.lm_head.weight": torch.ones(20, 16)})
    with pytest.raises(OptionError, match="6 of 8 inputs do not fit"):
        lt.pack([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = lt.pack([folder], tmp_path / "out", skip_unfit=True)
    assert [each.name for each in report.adapters] == ["a0", "a1"]
    causes = {each.name: each.causes[0] for each in report.unfit}
    for name, cause in {
        "dora": "DoRA",
        "other_base": "other shapes than in the adapters before it",
        "broken": "plain text, not tensors",
        "plain": "not a LoRA",
        "nan": "NaN or Inf",
        "whole": "1 tensor belongs to no module",
    }.items():
        assert cause in causes[name]


def test_a_program_decides_what_fits(tmp_path):
    llama = (("model.layers.0.self_attn.q_proj", (16, 16)), ("model.layers.0.self_attn.v_proj", (8, 16)))
    folder = tmp_path / "lib"
    make.peft(folder / "both", model=llama, ranks={"model.layers.0.self_attn.q_proj": 8})
    make.peft(folder / "q_alone", model=llama[:1], seed=1)
    make.peft(folder / "rslora", model=llama, seed=2, config={"use_rslora": True})
    report = lt.pack([folder], tmp_path / "out", runtime="sglang", skip_unfit=True)
    # One rank and the scale in the factors are what it needs of the other two.
    assert [each.name for each in report.adapters] == ["both", "rslora"]
    assert [each.name for each in report.unfit] == ["q_alone"]
    assert "v_proj" in report.unfit[0].causes[0]
    for entry in report.adapters:
        assert lt.doctor(tmp_path / "out" / entry.path, runtime="sglang").ok
    with pytest.raises(OptionError, match="3 of 3 inputs do not fit"):
        lt.pack([folder], tmp_path / "limited", runtime="vllm", max_rank=2, skip_unfit=True)


def test_how_a_source_file_is_called_is_no_matter_to_the_program(tmp_path):
    make.mlx(tmp_path / "lib" / "apple")
    report = lt.pack([tmp_path / "lib"], tmp_path / "out", runtime="vllm")
    assert [each.name for each in report.adapters] == ["apple"]
    assert lt.doctor(tmp_path / "out" / report.adapters[0].path, runtime="vllm").ok


def test_ranks_above_all_buckets_are_refused(tmp_path):
    library(tmp_path / "lib", 1, rank=8)
    with pytest.raises(OptionError, match="rank of 8 is above all of --ranks"):
        lt.pack([tmp_path / "lib"], tmp_path / "out", ranks=[2, 4])


def test_nothing_to_pack_and_no_place_for_it(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="the library is empty"):
        lt.pack([tmp_path / "empty"], tmp_path / "out")
    folder = library(tmp_path / "lib", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear", "utf-8")
    with pytest.raises(OutputExistsError, match="is no pack"):
        lt.pack([folder], tmp_path / "mine", overwrite=True)
    lt.pack([folder], tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        lt.pack([folder], tmp_path / "out")
    with pytest.raises(OptionError, match="--shared-basis"):
        lt.pack([folder], tmp_path / "new", diagonal=True)


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path):
    folder = library(tmp_path / "lib")
    dry = lt.pack([folder], tmp_path / "out", ranks=[8], dry_run=True)
    assert [each.name for each in tmp_path.iterdir()] == ["lib"]
    done = lt.pack([folder], tmp_path / "out", ranks=[8])
    assert dry.bytes == done.bytes
    assert dry.estimate is not None
    assert dry.estimate.tasks == len(dry.adapters) + len(dry.aliases)
    assert [each.hash for each in dry.adapters] == [each.hash for each in done.adapters]
    lt.unpack(tmp_path / "out", tmp_path / "back", dry_run=True)
    assert not (tmp_path / "back").exists()


def test_unpacking_says_what_is_wrong(tmp_path):
    folder = library(tmp_path / "lib", 2)
    lt.pack([folder], tmp_path / "out")
    with pytest.raises(OptionError, match="no adapter 'a7'"):
        lt.unpack(tmp_path / "out", tmp_path / "back", names=["a7"])
    with pytest.raises(NotAnAdapterError, match="it is no pack"):
        lt.unpack(folder, tmp_path / "back")
    file = tmp_path / "out/adapters/a1/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MalformedFileError, match="another than was packed"):
        lt.unpack(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    for text in (
        "[]",
        "{",
        '{"format": "loratools-pack", "version": 9}',
        '{"format": "loratools-pack", "version": 1}',
    ):
        (tmp_path / "out/index.json").write_text(text, "utf-8")
        with pytest.raises(LoraError):
            lt.unpack(tmp_path / "out", tmp_path / "back")


def test_equal_names_are_told_apart(tmp_path):
    make.peft(tmp_path / "x/style", seed=0)
    make.peft(tmp_path / "y/style", seed=1)
    report = lt.pack([tmp_path / "x/style", tmp_path / "y/style", tmp_path / "x"], tmp_path / "out")
    assert [each.name for each in report.adapters] == ["style", "style-2"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_shared_basis_of_full_rank_gives_every_adapter_back(tmp_path, diagonal):
    folder = library(tmp_path / "lib", 3)
    report = lt.pack([folder], tmp_path / "out", shared_basis=12, diagonal=diagonal)
    assert all(each.error < 1e-6 for each in report.adapters)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "index.json",
        "shared_basis.safetensors",
    ]
    lt.unpack(tmp_path / "out", tmp_path / "back")
    for name in ("a0", "a1", "a2"):
        expected = make.deltas_of(lt.load(folder / name))
        make.assert_close(make.deltas_of(lt.load(tmp_path / "back" / name)), expected, make.TOLERANCE["F32"])


def test_a_shared_basis_says_how_much_it_loses(tmp_path):
    folder = library(tmp_path / "lib", 4)
    make.peft(folder / "part", seed=8, model=make.LLAMA[:2], rank=2)
    before = None
    for rank in (2, 4, 8):
        report = lt.pack([folder], tmp_path / f"out{rank}", shared_basis=rank)
        dry = lt.pack([folder], tmp_path / "dry", shared_basis=rank, dry_run=True)
        assert (dry.bytes, dry.adapters) == (report.bytes, report.adapters)
        lt.unpack(tmp_path / f"out{rank}", tmp_path / f"back{rank}")
        for entry in report.adapters:
            expected = make.deltas_of(lt.load(folder / entry.name))
            found = make.deltas_of(lt.load(tmp_path / f"back{rank}" / entry.name))
            assert found.keys() == expected.keys()
            away = sum(float(((found[key] - expected[key]) ** 2).sum()) for key in expected)
            size = sum(float((expected[key] ** 2).sum()) for key in expected)
            assert entry.error == pytest.approx((away / size) ** 0.5, rel=1e-4)
            assert len(entry.errors) == len(expected)
        total = sum(part.error**2 * part.adapters for part in report.shared)
        assert before is None or total < before
        before = total


def test_a_full_disk_is_no_fault_of_the_adapter_that_was_written(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_pack_files.Prepared, "write", full)
    with pytest.raises(WriteError, match=r"a0: cannot be written: No space left.*Make room"):
        lt.pack([library(tmp_path / "lib")], tmp_path / "out", skip_unfit=True)
    assert [each.name for each in tmp_path.iterdir()] == ["lib"]
