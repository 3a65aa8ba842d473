"""Bad input to ``bake``, ``extract`` and ``verify``: named, refused, and nothing written or changed."""

import os
import pickle
import struct

import factories
import pytest
import torch

from tests.cli import checkpoint_files as make
from tests.cli.checkpoint_files import QUERY, refused
from tests.ops import sd15_checkpoints

BAKE = ("bake", "base.safetensors", "a.safetensors", "-o", "out.safetensors")
EXTRACT = ("extract", "base.safetensors", "tuned.safetensors", "-o", "out.safetensors", "--rank", "2")


def swapped(command, **files):
    """A command with other files in the place of the usual ones: base, tuned, a (the adapter), out."""
    return [files.get(str(word).partition(".")[0], word) for word in command]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Files are named as a user types them."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return make.standard(tmp_path)


@pytest.mark.parametrize("options", [(), ("--skip-missing",)])
def test_an_adapter_that_matches_nothing_is_no_copy(folder, options):
    factories.kohya(folder / "flux.safetensors", "flux")
    found = refused(folder, *swapped(BAKE, a="flux.safetensors"), *options)
    assert "flux.safetensors: none of the 9 modules is in base.safetensors (double_blocks.0" in found
    assert "looks like Flux.1, the base like Stable Diffusion 1.x" in found
    assert "Give the base that the adapter was trained on." in found


def test_an_adapter_that_matches_in_part_names_the_rest(folder):
    make.state(
        folder / "base.safetensors",
        {key: each for key, each in sd15_checkpoints.tensors().items() if "attn2" not in key},
    )
    found = refused(folder, *BAKE)
    assert "a.safetensors: 2 of 12 modules target weights that base.safetensors does not have" in found
    assert "attn2.to_k" in found
    assert "attn2.to_v" in found
    assert "--skip-missing to bake the other 10" in found


def test_a_component_that_the_base_lacks_is_left_out_by_name(folder):
    """What the message says to do helps."""
    unet = {key: each for key, each in sd15_checkpoints.tensors().items() if key.startswith(make.UNET)}
    make.state(folder / "base.safetensors", unet)
    found = refused(folder, *BAKE)
    assert "Both look like Stable Diffusion 1.x" in found
    assert "--components denoiser" in found
    assert make.invoke(*BAKE, "--components", "denoiser").exit_code == 0


@pytest.mark.parametrize("other", ["flux", "sdxl"])
def test_two_checkpoints_of_different_architectures(folder, other):
    prefixes = {"denoiser": make.UNET if other == "sdxl" else ""}
    weights = factories.SDXL if other == "sdxl" else factories.FLUX_FUSED
    make.state(
        folder / "tuned.safetensors",
        {
            f"{prefixes[each.component]}{each.target}.weight": torch.zeros(each.shape)
            for each in weights
            if each.component in prefixes
        },
    )
    found = refused(folder, *EXTRACT)
    assert f"tuned.safetensors: this is {other}, and base.safetensors is sd15" in found
    assert "--arch" in found


def test_keys_and_shapes_that_differ_are_named(folder):
    found = make.tuned()
    del found[QUERY]
    make.state(folder / "tuned.safetensors", found)
    assert f"not in it ({QUERY})" in refused(folder, *EXTRACT)
    make.state(folder / "tuned.safetensors", {**found, QUERY: torch.zeros(15, 12)})
    message = refused(folder, *EXTRACT)
    assert f"{QUERY} is [15, 12] instead of [12, 12]" in message
    assert "--exclude" in message


def test_an_inpainting_model_is_told_by_its_channels(folder):
    key = f"{make.UNET}input_blocks.0.0.weight"
    for name, channels in (("base", 4), ("tuned", 9)):
        weights = sd15_checkpoints.tensors() if name == "base" else make.tuned()
        make.state(folder / f"{name}.safetensors", {**weights, key: torch.ones(8, channels, 3, 3)})
    found = refused(folder, *EXTRACT)
    assert "is an inpainting or editing model: its first convolution reads 9 channels" in found
    assert r"--exclude 'input_blocks\.0\.0'" in found
    assert make.invoke(*EXTRACT, "--exclude", r"input_blocks\.0\.0").exit_code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_with_its_file(folder, value):
    for name, weights in (("base", sd15_checkpoints.tensors()), ("tuned", make.tuned())):
        weights[QUERY].view(-1)[3] = value
        make.state(folder / f"odd-{name}.safetensors", weights)
    for command in (BAKE, EXTRACT):
        found = refused(folder, *swapped(command, base="odd-base.safetensors"))
        assert "odd-base.safetensors: " in found
        assert f"({QUERY})" in found
    found = refused(folder, *swapped(EXTRACT, tuned="odd-tuned.safetensors"))
    assert f"odd-tuned.safetensors: 1 of 144 values are NaN or infinite ({QUERY})" in found


def test_an_adapter_that_is_not_finite_is_named(folder):
    weights = factories.read_safetensors(folder / "a.safetensors")[0]
    key = next(key for key in weights if key.endswith("attn1_to_q.lora_down.weight"))
    data = (folder / "a.safetensors").read_bytes()
    at = data.index(weights[key][2])
    (folder / "a.safetensors").write_bytes(data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :])
    found = refused(folder, *BAKE)
    assert f"hold NaN or infinity ({key})" in found
    assert QUERY in found


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", r"C:\x.safetensors", "sub/x.safetensors"]
)
def test_an_index_that_names_files_elsewhere_is_refused(folder, name):
    make.index(folder / "m", name)
    for command in (
        swapped(BAKE, base="m", out="out"),
        swapped(EXTRACT, tuned="m"),
        ("verify", "base.safetensors", "a.safetensors", "m"),
    ):
        found = refused(folder, *command)
        assert found.startswith("Error: m/model.safetensors.index.json: the index names 1 file")
        assert f"({name})" in found
        assert "Do not use it" in found


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_shard_is_named(folder, damage):
    shard = folder / "m" / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink() if damage == "missing" else shard.write_bytes(b"" if damage == "empty" else data[:-100])
    for command in (
        swapped(BAKE, base="m", out="out"),
        swapped(EXTRACT, tuned="m"),
        ("verify", "base.safetensors", "a.safetensors", "m"),
    ):
        found = refused(folder, *command)
        assert shard.name in found
        assert "ownload" in found


class _Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("container", ["archive", "plain"])
def test_a_pickle_with_code_in_it_is_never_run(folder, container):
    if container == "archive":
        torch.save({"state_dict": sd15_checkpoints.tensors(), "x": _Code()}, folder / "bad.ckpt")
    else:
        (folder / "bad.ckpt").write_bytes(pickle.dumps(_Code()))
    for command in (
        swapped(BAKE, base="bad.ckpt", out="out.ckpt"),
        swapped(BAKE, a="bad.ckpt"),
        swapped(EXTRACT, base="bad.ckpt"),
        swapped(EXTRACT, tuned="bad.ckpt"),
        ("verify", "bad.ckpt", "a.safetensors", "base.safetensors"),
        ("verify", "base.safetensors", "a.safetensors", "bad.ckpt"),
    ):
        found = refused(folder, *command)
        assert "bad.ckpt: the pickle would have to run code" in found
        assert "system)" in found


def test_files_in_each_other_s_place_are_told_what_they_are(folder):
    make.state(folder / "ti.safetensors", {"emb_params": torch.zeros(4, 768)})
    factories.peft(folder / "peft")
    for name, what in (
        ("a.safetensors", "an adapter"),
        ("peft", "an adapter"),
        ("ti.safetensors", "a textual inversion"),
    ):
        out = "out" if name == "peft" else "out.safetensors"
        for command in (
            swapped(BAKE, base=name, out=out),
            swapped(EXTRACT, base=name),
            swapped(EXTRACT, tuned=name),
        ):
            assert f"{name}: this is {what}, not a model checkpoint" in refused(folder, *command)


def test_what_is_no_adapter_is_told_what_it_is(folder):
    names = ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight")
    vae = {name: torch.zeros(4, 4, 3, 3) for name in names}
    ip_adapter = {
        "image_proj.proj.weight": torch.zeros(8, 4),
        "ip_adapter.1.to_k_ip.weight": torch.zeros(4, 4),
    }
    make.state(folder / "ti.safetensors", {"emb_params": torch.zeros(4, 768)})
    make.state(folder / "vae.safetensors", vae)
    make.state(folder / "ip.safetensors", ip_adapter)
    for name, what in (
        ("ti.safetensors", "a textual inversion"),
        ("vae.safetensors", "a VAE"),
        ("ip.safetensors", "an IP-Adapter"),
        ("tuned.safetensors", "a model checkpoint"),
    ):
        assert f"{name}: this is {what}, not a LoRA adapter" in refused(folder, *swapped(BAKE, a=name))
    assert "loratools extract BASE TUNED" in refused(folder, *swapped(BAKE, a="tuned.safetensors"))
    assert "m: this is the folder of a model" in refused(folder, *swapped(BAKE, a="m"))


def test_a_gguf_is_refused_by_name(folder):
    (folder / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    for command in (
        swapped(BAKE, base="x.gguf"),
        swapped(EXTRACT, base="x.gguf"),
        swapped(EXTRACT, tuned="x.gguf"),
    ):
        assert "x.gguf: a GGUF file, whose weights are not read as a base model's" in refused(
            folder, *command
        )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            swapped(BAKE, out="tuned.safetensors"),
            "tuned.safetensors: the output exists already. Pass --overwrite",
        ),
        (
            swapped(BAKE, out="base.safetensors"),
            "base.safetensors: the output exists already. Pass --overwrite",
        ),
        (swapped(BAKE, out="none/out.safetensors"), "does not exist. Create it"),
        (swapped(BAKE, out="m"), "m: the base is a file, and the output has no file's name"),
        (swapped(BAKE, out="out.ckpt"), "out.ckpt: a .ckpt is written from a .ckpt alone"),
        (swapped(BAKE, base="m", out="m"), "m: the output is a folder and holds files."),
        (
            swapped(BAKE, base="m", out="m/inner"),
            "m/inner: the output would lie inside the base model's folder",
        ),
        (
            swapped(BAKE, base="m", out="a.safetensors"),
            "a.safetensors: the base is a folder, and the output has a file",
        ),
        (swapped(BAKE, base="none"), "none: no such file"),
        (swapped(BAKE, a="none"), "none: no such file"),
        (swapped(EXTRACT, out="a.safetensors"), "a.safetensors: the output exists already. Pass --overwrite"),
        (
            (*swapped(EXTRACT, out="base.safetensors"), "--overwrite"),
            "the output would be written over a checkpoint",
        ),
        (swapped(EXTRACT, out="out.ckpt"), "out.ckpt: a .ckpt file is not written"),
        ((*swapped(EXTRACT, out="out"), "--to", "peft"), "out: the peft layout cannot hold"),
    ],
)
def test_an_output_that_cannot_be_is_refused(folder, command, message):
    assert message in refused(folder, *command)


def test_advice_names_options_that_the_command_has(folder):
    found = refused(folder, *swapped(EXTRACT, out="out"), "--to", "peft")
    assert "--drop" not in found
    assert "Leave them out with --components or --exclude." in found
    assert (
        make.invoke(*swapped(EXTRACT, out="out"), "--to", "peft", "--components", "denoiser").exit_code == 0
    )


@pytest.mark.parametrize("command", [BAKE, EXTRACT])
def test_an_empty_output_is_wrong_usage(command):
    result = make.invoke(*swapped(command, out=""))
    assert result.exit_code == 2
    assert "the name is empty" in result.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="a folder that nobody may write in")
def test_a_folder_that_may_not_be_written_in(folder):
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o500)
    for command in (BAKE, EXTRACT):
        found = refused(folder, *swapped(command, out="closed/out.safetensors"))
        assert "closed/out.safetensors: cannot be written: Permission denied" in found
