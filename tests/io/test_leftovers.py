"""What of an older model goes when a new one is written into its folder, and which weights a bake does not change."""

from __future__ import annotations

import json

import pytest

from loratools.io._leftovers import superseded, unbaked

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return str(folder)


@pytest.mark.parametrize(
    ("held", "written", "gone"),
    [
        # One file is loaded before an index, and an index before a pickle.
        (("model.safetensors",), (*SHARDS, INDEX), {"model.safetensors"}),
        ((*SHARDS, INDEX), ("model.safetensors",), {*SHARDS, INDEX}),
        (("model.safetensors",), ("pytorch_model.bin",), {"model.safetensors"}),
        # Shards of another count.
        (
            ("model-00001-of-00003.safetensors", SHARDS[0], INDEX),
            (*SHARDS, INDEX),
            {"model-00001-of-00003.safetensors"},
        ),
        # A variant would be the old model's.
        (
            ("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
            ("model.safetensors",),
            {"model.fp16.safetensors", "model.safetensors.index.fp16.json"},
        ),
        # What no library takes for the model stays.
        (
            (
                "mine.safetensors",
                "notes.md",
                "adapter_model.safetensors",
                "config.json",
                "sub/model.safetensors",
            ),
            ("model.safetensors",),
            set(),
        ),
        ((), ("model.safetensors",), set()),
    ],
)
def test_only_weights_and_indices_of_the_older_model_go(tmp_path, held, written, gone):
    assert {*superseded(fill(tmp_path, *held), written)} == gone


def test_a_pipeline_s_networks_go_with_its_index(tmp_path):
    network = "diffusion_pytorch_model.safetensors"
    fill(
        tmp_path,
        f"unet/{network}",
        "text_encoder_2/model.safetensors",
        "text_encoder_2/config.json",
        f"mine/{network}",
    )
    said = {
        "_class_name": "Pipeline",
        "unet": ["diffusers", "UNet"],
        "text_encoder_2": ["transformers", "CLIP"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(said))
    other = {"text_encoder_2/model.safetensors"}
    assert {*superseded(str(tmp_path), (f"unet/{network}", "model_index.json"))} == other
    assert {*superseded(str(tmp_path), ("model.safetensors",))} == {
        *other,
        f"unet/{network}",
        "model_index.json",
    }
    (tmp_path / "model_index.json").write_text("no JSON")
    assert superseded(str(tmp_path), ("model.safetensors",)) == ("model_index.json",)


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert superseded(str(tmp_path / "none"), ("model.safetensors",)) == ()


def test_weights_beside_the_model_are_told_from_all_else():
    weights = [
        "model.fp16.safetensors",
        "unet/model.onnx",
        "original/consolidated.00.pth",
        "flax_model.msgpack",
    ]
    others = [
        "config.json",
        "tokenizer.model",
        "training_args.bin",
        "optimizer.pt",
        "scheduler/scheduler_config.json",
    ]
    assert unbaked([*others, *weights]) == weights
