"""Reading is naming: every factory file is read with the ΔW it was made with, and written back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt

Maker = Callable[[Path], make.Made]

KOHYA: dict[str, Maker] = {
    "sd15": lambda to: make.kohya(to / "a.safetensors", "sd15"),
    "sd15-mid": lambda to: make.kohya(to / "a.safetensors", "sd15", mid=True),
    "sd15-f16": lambda to: make.kohya(to / "a.safetensors", "sd15", dtype=torch.float16),
    "sd15-bf16": lambda to: make.kohya(to / "a.safetensors", "sd15", dtype=torch.bfloat16),
    "sd15-no-alpha": lambda to: make.kohya(to / "a.safetensors", "sd15", alpha=None),
    "sd15-ranks": lambda to: make.kohya(
        to / "a.safetensors", "sd15", ranks={"attn1": 2, "conv": 3}, alphas={"attn2": 0.5, "te": 7}
    ),
    "sdxl": lambda to: make.kohya(to / "a.safetensors", "sdxl"),
    "sdxl-mid": lambda to: make.kohya(to / "a.safetensors", "sdxl", mid=True, metadata={"ss_seed": "1"}),
    "flux": lambda to: make.kohya(to / "a.safetensors", "flux"),
}
DIFFUSERS: dict[str, Maker] = {
    f"{arch}-{generation}-{'prefix' if prefix else 'bare'}": (
        lambda to, arch=arch, generation=generation, prefix=prefix: make.diffusers(
            to / "a.safetensors", arch, generation=generation, prefix=prefix
        )
    )
    for arch in ("sd15", "sdxl", "flux")
    for generation in ("peft-keys", "lora-updown", "attn-procs")
    for prefix in (True, False)
    if (arch, generation) != ("flux", "attn-procs")
}
PEFT: dict[str, Maker] = {
    "llama": lambda to: make.peft(to / "a"),
    "gpt2": lambda to: make.peft(to / "a", make.GPT2, config={"fan_in_fan_out": True}),
    "patterns": lambda to: make.peft(
        to / "a",
        ranks={"model.layers.0.mlp.down_proj": 2},
        alphas={"model.layers.1.self_attn.q_proj": 3},
    ),
    "rslora": lambda to: make.peft(to / "a", config={"use_rslora": True}),
    "embedding": lambda to: make.peft(to / "a", embedding=True),
    "bias": lambda to: make.peft(to / "a", lora_bias=True),
    "extras": lambda to: make.peft(
        to / "a",
        extra={"base_model.model.lm_head.weight": torch.ones(3, 4)},
        config={"modules_to_save": ["lm_head"]},
    ),
    "bin": lambda to: make.peft(to / "a", container="bin"),
    **{
        form: (lambda to, form=form: make.peft(to / "a", form=form))
        for form in ("named", "double", "fsdp", "compiled")
    },
    "no_prefix": lambda to: make.peft(to / "a", form="no_prefix"),
    "unknown": lambda to: make.peft(to / "a", make.STRANGE, component="model"),
}
# Kinds whose ΔW is not computed from the factors alone are still read and written whole.
WHOLE: dict[str, tuple[Maker, str]] = {
    **{
        kind: (
            lambda to, kind=kind: make.kohya(to / "a.safetensors", "sd15", kind=kind, only=["attn", "ff"]),
            {"lokr_full": "lokr"}.get(kind, kind),
        )
        for kind in ("loha", "lokr", "lokr_full", "oft", "glora", "full")
    },
    "dora-out": (lambda to: make.kohya(to / "a.safetensors", dora="out"), "lora"),
    "dora-in": (lambda to: make.kohya(to / "a.safetensors", dora="in"), "lora"),
    "dora-diffusers": (lambda to: make.diffusers(to / "a.safetensors", dora=True), "lora"),
    "dora-peft": (lambda to: make.peft(to / "a", dora=True), "lora"),
    "adalora": (lambda to: make.peft(to / "a", kind="adalora"), "adalora"),
}
READ = {f"kohya {name}": maker for name, maker in KOHYA.items()}
READ |= {f"diffusers {name}": maker for name, maker in DIFFUSERS.items()}
READ |= {f"peft {name}": maker for name, maker in PEFT.items()}


@pytest.mark.parametrize("name", READ)
def test_reads_with_the_delta_it_was_made_with(name: str, tmp_path: Path) -> None:
    made = READ[name](tmp_path)
    adapter = lt.load(made.path)
    assert adapter.type == "adapter"
    assert adapter.layout.name == name.split()[0]
    dtypes = {ref.dtype for module in adapter.modules.values() for ref in module.factors.values()}
    make.assert_close(make.deltas_of(adapter), made.deltas, max(1e-6 if d == "F32" else 1e-5 for d in dtypes))
    scales = {make.key_of(t.component, str(t)): m.scale for t, m in adapter.modules.items()}
    assert scales == pytest.approx(made.scales)


@pytest.mark.parametrize("name", READ)
def test_writes_back_what_it_read(name: str, tmp_path: Path) -> None:
    made = READ[name](tmp_path)
    output = tmp_path / ("out" if made.path.is_dir() else "out.safetensors")
    make.assert_round_trip(made, output)


@pytest.mark.parametrize("name", WHOLE)
def test_other_kinds_are_named_and_written_back(name: str, tmp_path: Path) -> None:
    maker, kind = WHOLE[name]
    made = maker(tmp_path)
    adapter = lt.load(made.path)
    assert set(adapter.kinds) == {kind}
    assert not adapter.extras
    make.assert_round_trip(made, tmp_path / ("out" if made.path.is_dir() else "out.safetensors"))


def test_ia3_is_named_and_never_called_a_lora(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind="ia3", only=["attn1"])
    with pytest.raises(lt.LoraError, match=r"\(IA\)³"):
        lt.load(made.path)


def test_vera_is_read_with_its_shared_matrices(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", kind="vera")
    adapter = lt.load(made.path)
    assert set(adapter.kinds) == {"vera"}
    make.assert_round_trip(made, tmp_path / "out")


def test_keys_of_an_unsorted_file_keep_their_order(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", metadata={"z": "1", "a": "2"})
    reversed_ = dict(reversed(list(made.tensors.items())))
    make.write_safetensors(made.path, reversed_, {"z": "1", "a": "2"})
    make.assert_round_trip(
        make.Made(made.path, made.file, made.deltas, reversed_), tmp_path / "out.safetensors"
    )


def test_extras_are_kept_whatever_they_are(tmp_path: Path) -> None:
    extra = {"bundle_emb.style.string_to_param.*": torch.randn(2, 768), "note": torch.zeros(0)}
    made = make.kohya(tmp_path / "a.safetensors", "sd15", extra={"strange.tensor": torch.ones(2), **extra})
    adapter = lt.load(made.path)
    assert set(adapter.extras) == {"strange.tensor", *extra}
    make.assert_round_trip(made, tmp_path / "out.safetensors")


def test_an_mlx_folder_is_read_and_written_back_with_its_scale(tmp_path: Path) -> None:
    made = make.mlx(tmp_path / "a", scale=2.5)
    adapter = lt.load(made.path)
    assert adapter.layout.name == "mlx"
    make.assert_close(make.deltas_of(adapter), made.deltas)
    lt.save(adapter, tmp_path / "out")
    make.assert_close(make.deltas_of(lt.load(tmp_path / "out")), made.deltas)


def test_an_mlx_folder_without_configuration_has_the_trainers_scale(tmp_path: Path) -> None:
    made = make.mlx(tmp_path / "a", scale=20.0, config=False)
    adapter = lt.load(made.path)
    make.assert_close(make.deltas_of(adapter), made.deltas)
    assert any("20" in note for note in adapter.notes)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    # The length's low bytes 0x80 0x02 are also how a pickle of protocol 2 begins.
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["attn1_to_q"])
    text = made.path.read_bytes()
    size = int.from_bytes(text[:8], "little")
    assert size < 0x280
    padded = text[8 : 8 + size].ljust(0x280) + text[8 + size :]
    made.path.write_bytes((0x280).to_bytes(8, "little") + padded)
    make.assert_close(make.deltas_of(lt.load(made.path, arch="sd15")), made.deltas)
