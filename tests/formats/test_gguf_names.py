"""llama.cpp's names: ours are those of the gguf package, and lead back to where they came from."""

from __future__ import annotations

import pytest

from loratools.formats import _gguf_names
from loratools.formats._gguf_tables import ARCHES

NAMES = [(arch, path) for arch in ARCHES for path in arch.names]


@pytest.mark.parametrize("arch", ARCHES, ids=lambda arch: arch.name)
def test_names_lead_back(arch) -> None:
    for path, name in arch.names.items():
        numbered = path.replace("#", "12")
        assert _gguf_names.spelt(arch, numbered) == name.replace("#", "12")
        back = _gguf_names.understood(arch, name.replace("#", "12"))
        assert back is not None
        assert _gguf_names.spelt(arch, back) == name.replace("#", "12")


def test_names_of_other_classes_of_a_model_mean_the_same() -> None:
    llama, gpt2 = _gguf_names.of_model_type("mistral"), _gguf_names.arch_of("gpt2")
    for prefix in ("model.", "", "model.language_model.", "language_model.model."):
        assert _gguf_names.spelt(llama, f"{prefix}layers.3.mlp.up_proj") == "blk.3.ffn_up"
    assert _gguf_names.spelt(gpt2, "h.0.attn.c_attn") == "blk.0.attn_qkv"
    assert _gguf_names.spelt(llama, "model.layers.3.mlp.nothing") is None
    assert _gguf_names.understood(llama, "blk.3.nothing") is None


def test_no_two_architectures_claim_a_type() -> None:
    types = [kind for arch in ARCHES for kind in arch.model_types]
    assert len(types) == len(set(types))


@pytest.mark.peers
@pytest.mark.parametrize("arch", ARCHES, ids=lambda arch: arch.name)
def test_names_are_those_of_the_package(arch) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[arch.name], 4)
    for path, name in arch.names.items():
        # llama.cpp's converter takes BLOOM's prefix off before it looks names up.
        asked = path.removeprefix("transformer.") if arch.name == "bloom" else path
        found = table.get_name(asked.replace("#", "2") + ".weight", try_suffixes=(".weight",))
        assert found == name.replace("#", "2") + ".weight", path
