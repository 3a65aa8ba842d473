"""Verification fails when it should: whatever is wrong with what was written, no output takes its name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.errors import ConversionError
from loratools.model import Adapter, Module, Rows, Target
from loratools.ops import _probe, convert, files
from loratools.tensors import from_torch

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
Fault = Callable[[Tensors, dict[str, str]], str]

TO_Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
QKV = "double_blocks.0.img_attn.qkv"


def rewrite(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def named(tensors: Tensors, *parts: str) -> str:
    return next(key for key in tensors if all(part in key for part in parts))


def changed(tensors: Tensors, key: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    dtype, shape, data = tensors[key]
    array = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).reshape(shape).copy()
    tensors[key] = (dtype, shape, np.ascontiguousarray(change(array)).tobytes())


def flip_a_bit(tensors: Tensors, metadata: dict[str, str]) -> str:
    def flip(array: np.ndarray) -> np.ndarray:
        # The lowest bit of the exponent of one number: it doubles, or halves.
        array.reshape(-1).view("<u4")[3] ^= 1 << 23
        return array

    changed(tensors, named(tensors, "to_q", ".lora_down"), flip)
    return TO_Q


def swap_modules(tensors: Tensors, metadata: dict[str, str]) -> str:
    one, other = named(tensors, "attn1_to_q", ".lora_up"), named(tensors, "attn1_to_out_0", ".lora_up")
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return TO_Q


def lose_the_scale(tensors: Tensors, metadata: dict[str, str]) -> str:
    del tensors[named(tensors, "to_q", "alpha")]
    return TO_Q


def drop_a_module(tensors: Tensors, metadata: dict[str, str]) -> str:
    for key in [key for key in tensors if "attn1_to_q" in key]:
        del tensors[key]
    return TO_Q


def exchange_halves(tensors: Tensors, metadata: dict[str, str]) -> str:
    changed(
        tensors, named(tensors, "to_q", ".lora_up"), lambda array: np.roll(array, len(array) // 2, axis=0)
    )
    return TO_Q


def turn_a_sign(tensors: Tensors, metadata: dict[str, str]) -> str:
    changed(tensors, named(tensors, "to_q", ".lora_up"), lambda array: -array)
    return TO_Q


def not_a_number(tensors: Tensors, metadata: dict[str, str]) -> str:
    changed(tensors, named(tensors, "to_q", ".lora_up"), lambda array: np.full_like(array, np.nan))
    return TO_Q


def add_a_module(tensors: Tensors, metadata: dict[str, str]) -> str:
    for key in [key for key in tensors if "attn1_to_q" in key]:
        tensors[key.replace("attn1_to_q", "attn1_to_v")] = tensors[key]
    return TO_Q.replace("to_q", "to_v")


FAULTS = [
    flip_a_bit,
    swap_modules,
    lose_the_scale,
    drop_a_module,
    exchange_halves,
    turn_a_sign,
    not_a_number,
    add_a_module,
]


@pytest.fixture
def sabotage(monkeypatch):
    """Change what is written, between the writing and the check; returns the weights that are at fault."""

    def install(fault: Fault) -> list[str]:
        hit: list[str] = []
        write = files.write

        def broken(document, form, path, *, check=None, **options):
            def checked(written: str) -> None:
                file = Path(written)
                file = file / form.weights if file.is_dir() else file
                tensors, metadata = make.read_safetensors(file)
                hit.append(fault(tensors, metadata))
                rewrite(file, tensors, metadata)
                check(written)

            return write(document, form, path, check=checked, **options)

        monkeypatch.setattr(files, "write", broken)
        return hit

    return install


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return make.diffusers(
        folder / "a.safetensors", "sd15", header={"unet": make.lora_config(4, 3.0, [])}
    ).path


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "b.safetensors"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_what_was_written_is_found(fault, sabotage, source, out):
    hit = sabotage(fault)
    with pytest.raises(ConversionError) as caught:
        convert.convert_file(source, out, to="kohya")
    assert hit[0] in " ".join(caught.value.keys)
    assert hit[0] in str(caught.value)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("fault", FAULTS[:3], ids=lambda fault: fault.__name__)
def test_an_output_that_is_there_already_is_not_touched(fault, sabotage, source, out):
    out.write_bytes(b"precious")
    sabotage(fault)
    with pytest.raises(ConversionError):
        convert.convert_file(source, out, to="kohya", overwrite=True)
    assert out.read_bytes() == b"precious"
    assert list(out.parent.iterdir()) == [out]


def test_an_input_that_is_its_own_output_is_not_touched(sabotage, source):
    before = make.digest(source)
    sabotage(drop_a_module)
    with pytest.raises(ConversionError):
        convert.convert_file(source, source, to="kohya", overwrite=True)
    assert make.digest(source) == before


def test_nothing_is_compared_where_that_is_not_wanted(source, out):
    report = convert.convert_file(source, out, to="kohya", check=False)
    assert report.weights is report.error is None
    assert lt.load(out).modules


def test_a_scale_lost_from_the_header_is_found(sabotage, source, out):
    def lose(tensors: Tensors, metadata: dict[str, str]) -> str:
        said = json.loads(metadata["lora_adapter_metadata"])
        assert said["unet.lora_alpha"] == 3
        metadata["lora_adapter_metadata"] = json.dumps(said | {"unet.lora_alpha": 4})
        return TO_Q

    sabotage(lose)
    with pytest.raises(ConversionError, match="10 of 12"):
        convert.convert_file(source, out, to="diffusers")
    assert not out.exists()


def test_a_folder_is_not_left_behind(sabotage, tmp_path):
    made = make.peft(tmp_path / "a")
    out = tmp_path / "out"

    def drop(tensors: Tensors, metadata: dict[str, str]) -> str:
        for key in [key for key in tensors if "layers.1.self_attn.v_proj" in key]:
            del tensors[key]
        return "v_proj"

    sabotage(drop)
    with pytest.raises(ConversionError, match="1 of 5"):
        convert.convert_file(made.path, out, to="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_speller_that_mixes_names_up_is_found(dry_run, source, out, monkeypatch):
    kohya = formats.get("kohya")

    def mixed(module: Module, adapter: Adapter, layout):
        tensors = kohya.speller(module, adapter, layout)
        swap = {"_to_q.": "_to_out_0.", "_to_out_0.": "_to_q."}
        here = next((part for part in swap if part in tensors[0].name), "")
        return [ref.renamed(ref.name.replace(here, swap[here])) if here else ref for ref in tensors]

    known = formats.get
    bad = kohya._replace(speller=mixed)
    monkeypatch.setattr(formats, "get", lambda name: bad if name == "kohya" else known(name))
    with pytest.raises(ConversionError) as caught:
        convert.convert_file(source, out, to="kohya", dry_run=dry_run)
    assert {key.split(" ")[0].rpartition(".attn1.")[2] for key in caught.value.keys} == {"to_q", "to_out.0"}
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr_full", "full", "glora", "oft"])
def test_faults_in_other_kinds_are_found(kind, sabotage, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    made = make.kohya(folder / "a.safetensors", "sd15", kind=kind, alpha=None)

    def double(tensors: Tensors, metadata: dict[str, str]) -> str:
        key = next(key for key in tensors if "attn1_to_q" in key and not key.endswith("alpha"))
        changed(tensors, key, lambda array: 2 * array)
        return TO_Q

    sabotage(double)
    with pytest.raises(ConversionError, match="1 of 12") as caught:
        convert.convert_file(made.path, tmp_path / "out.safetensors", to="kohya", arch="sd15")
    assert TO_Q in caught.value.keys[0]


@pytest.mark.parametrize("role", ["dora_scale", "diff_b"])
def test_faults_beside_the_factors_are_found(role, sabotage, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    made = make.kohya(
        folder / "a.safetensors", "sd15", dora="out", extra={f"{name}.diff_b": torch.arange(12.0)}
    )

    def shift(tensors: Tensors, metadata: dict[str, str]) -> str:
        changed(tensors, named(tensors, "attn1.to_q", role), lambda array: np.roll(array, 1, axis=0))
        return TO_Q

    sabotage(shift)
    with pytest.raises(ConversionError, match=TO_Q):
        convert.convert_file(made.path, tmp_path / "out.safetensors", to="comfy")


def test_a_half_of_a_fused_weight_in_the_wrong_place_is_found(sabotage, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    made = make.diffusers(folder / "a.safetensors", "flux")

    def turn(tensors: Tensors, metadata: dict[str, str]) -> str:
        key = named(tensors, "img_attn_qkv", ".lora_up")
        changed(tensors, key, lambda array: np.roll(array, len(array) // 3, axis=0))
        return QKV

    sabotage(turn)
    with pytest.raises(ConversionError, match=QKV):
        convert.convert_file(made.path, tmp_path / "out.safetensors", to="kohya")


def test_rounding_to_the_store_dtype_is_no_fault(source, out):
    report = convert.convert_file(source, out, to="kohya", dtype="float16")
    assert report.weights == 12
    assert 0 < report.error < 1e-3
    assert report.worst
    assert lt.load(out).modules


# compare() itself, on modules in memory.


def product(up: torch.Tensor, down: torch.Tensor, *, scale: float = 1.0, rows: Rows | None = None) -> Module:
    factors = {"up": from_torch("", up), "down": from_torch("", down)}
    shape = (up.shape[0], down.shape[1])
    return Module(Target("denoiser", QKV, rows), "lora", factors, scale, rank=down.shape[0], shape=shape)


def probed(mine: list[Module], theirs: list[Module], rounded: str = "") -> _probe.Probed:
    return _probe.compare("flux", mine, theirs, {("denoiser", QKV): rounded} if rounded else {})


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.randn(4, 10, generator=generator)


def test_the_same_product_by_other_factors_is_the_same(factors):
    up, down = factors
    found = probed([product(up, down, scale=0.5)], [product(up / 4, down * 2)])
    assert (found.weights, found.failed) == (1, ())
    assert found.error < 1e-7


def test_a_weight_and_its_parts_are_compared_as_a_whole(factors):
    up, down = factors
    thirds = [Rows(((part, part + 1),), 3) for part in range(3)]
    parts = [product(up[4 * i : 4 * i + 4], down, rows=rows) for i, rows in enumerate(thirds)]
    assert not probed([product(up, down)], parts).failed
    assert probed([product(up, down)], [parts[0], parts[1]]).failed
    swapped = [part._replace(target=part.target._replace(rows=thirds[2 - i])) for i, part in enumerate(parts)]
    assert probed([product(up, down)], swapped).failed


@pytest.mark.parametrize(("rounded", "error", "fails"), [
    ("", 1e-5, True),
    ("F32", 1e-7, False),
    ("F32", 1e-4, True),
    ("F16", 1e-3, False),
    ("F16", 1e-1, True),
    ("BF16", 1e-2, False),
    ("BF16", 1e-1, True),
])  # fmt: skip
def test_as_much_is_allowed_as_the_store_dtype_rounds(factors, rounded, error, fails):
    up, down = factors
    found = probed([product(up, down)], [product(up, down * (1 + error))], rounded)
    assert bool(found.failed) is fails
    assert found.error == pytest.approx(error, rel=0.5)


def test_another_width_is_infinitely_wrong(factors):
    up, down = factors
    found = probed([product(up, down)], [product(up, down[:, :8])])
    assert found.error == float("inf")
    assert found.worst == QKV
