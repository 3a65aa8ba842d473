"""The tensors of base models by their headers: files, shards, folders, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import factories as make
import pytest
import torch

from loratools.errors import MalformedFileError, MissingFileError
from loratools.io.base import Base, Shard, keys_of

ROOT = Path(__file__).resolve().parents[2]
ONE = {"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3, dtype=torch.bfloat16)}
TWO = {"b.weight": torch.zeros(5, 1, 1)}


def sharded(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], index: str = "model") -> Path:
    for name, tensors in shards.items():
        make.write_safetensors(folder / name, tensors, None)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    file = folder / f"{index}.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return file


def facts(part: Mapping[str, object]) -> dict[str, tuple[tuple[int, ...], str, str]]:
    return {key: (each.shape, each.dtype, Path(each.file).name) for key, each in part.items()}  # type: ignore[attr-defined]


def test_a_file_is_one_part_whatever_its_container(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "m.safetensors", ONE, None)
    torch.save({"state_dict": ONE}, tmp_path / "m.ckpt")
    for name in ("m.safetensors", "m.ckpt"):
        found = keys_of(tmp_path / name)
        assert found.path == str(tmp_path / name)
        assert {part: facts(weights) for part, weights in found.parts.items()} == {
            "": {"a.weight": ((3, 2), "F32", name), "a.bias": ((3,), "BF16", name)}
        }


@pytest.mark.parametrize("by_index", [True, False])
def test_shards_are_one_part_and_each_tensor_says_where_it_lies(by_index: bool, tmp_path: Path) -> None:
    index = sharded(tmp_path, {"m-1.safetensors": ONE, "m-2.safetensors": TWO})
    found = keys_of(index if by_index else tmp_path)
    assert facts(found.parts[""]) == {
        "a.weight": ((3, 2), "F32", "m-1.safetensors"),
        "a.bias": ((3,), "BF16", "m-1.safetensors"),
        "b.weight": ((5, 1, 1), "F32", "m-2.safetensors"),
    }


def test_a_file_is_no_folder_and_has_nothing_beside_it(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "m.safetensors", ONE, {"format": "pt"})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    found = keys_of(tmp_path / "m.safetensors")
    size = (tmp_path / "m.safetensors").stat().st_size
    shard = Shard(
        str(tmp_path / "m.safetensors"), "m.safetensors", "", "safetensors", size, {"format": "pt"}, (*ONE,)
    )
    assert found._replace(parts={}) == Base(found.path, {}, shards=(shard,), configs={"": {}})


def test_a_model_s_folder_says_what_lies_beside_its_weights(tmp_path: Path) -> None:
    sharded(tmp_path, {"m-1.safetensors": ONE, "m-2.safetensors": TWO})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (tmp_path / "tokenizer.json").write_text("{}")
    make.write_safetensors(tmp_path / "m.fp16.safetensors", ONE, None)
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "download.metadata").write_text("")
    (tmp_path / "original" / "deep").mkdir(parents=True)
    (tmp_path / "original" / "deep" / "params.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        found = keys_of(path)
        assert found.folder == str(tmp_path)
        assert [(shard.name, shard.part, shard.keys) for shard in found.shards] == [
            ("m-1.safetensors", "", tuple(ONE)),
            ("m-2.safetensors", "", tuple(TWO)),
        ]
        assert found.indices == {"": "model.safetensors.index.json"}
        assert found.configs == {"": {"model_type": "llama", "tie_word_embeddings": True}}
        assert found.beside == (
            *("config.json", "m.fp16.safetensors", "original/deep/params.json", "tokenizer.json"),
        )


def test_an_index_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path, {"m-1.safetensors": ONE})
    monkeypatch.chdir(tmp_path)
    found = keys_of("model.safetensors.index.json")
    assert (found.folder, found.beside) == (".", ())
    assert Path(found.parts[""]["a.bias"].file).is_file()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_as_a_download_s_cache_has_them(tmp_path: Path) -> None:
    """A snapshot in which every file, shards too, is a link to a file elsewhere; and a folder that holds itself."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    sharded(blobs, {"m-1.safetensors": ONE, "m-2.safetensors": TWO})
    (blobs / "config.json").write_text('{"a": 1}')
    (blobs / "tokenizer.model").write_text("t")
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        target = blobs / str(number)
        file.rename(target)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", target.name))
    (snapshot / "inner").mkdir()
    (snapshot / "inner" / "up").symlink_to(snapshot)
    (snapshot / "dangling.txt").symlink_to(tmp_path / "nowhere")
    found = keys_of(snapshot)
    assert list(found.parts[""]) == [*ONE, *TWO]
    assert found.configs == {"": {"a": 1}}
    assert found.beside == ("config.json", "tokenizer.model")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"m-1.safetensors": ONE, "m-2.safetensors": TWO})
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(MissingFileError, match="1 of 2 shards are missing") as caught:
        keys_of(tmp_path)
    assert caught.value.keys == ("m-2.safetensors",)


def test_a_key_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"m-1.safetensors": ONE, "m-2.safetensors": TWO})
    make.write_safetensors(tmp_path / "m-2.safetensors", {"c.weight": torch.zeros(1)}, None)
    with pytest.raises(MalformedFileError, match="in none of the shards") as caught:
        keys_of(index)
    assert caught.value.keys == ("b.weight",)


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"m-1.safetensors": ONE, "m-2.safetensors": {**TWO, "a.bias": torch.zeros(3)}})
    with pytest.raises(MalformedFileError, match="1 tensors are in more than one") as caught:
        keys_of(tmp_path)
    assert caught.value.keys == ("a.bias",)


def test_what_an_index_forgets_is_the_file_s_all_the_same(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"m-1.safetensors": ONE, "m-2.safetensors": TWO})
    said = json.loads(index.read_text())
    del said["weight_map"]["a.bias"]
    index.write_text(json.dumps(said))
    found = keys_of(tmp_path)
    assert list(found.parts[""]) == [*ONE, *TWO]
    assert found.shards[0].keys == tuple(ONE)


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_a_truncated_shard_is_named(container: str, tmp_path: Path) -> None:
    names = [f"m-{i}.{container}" for i in (1, 2)]
    if container == "bin":
        for name, tensors in zip(names, (ONE, TWO), strict=True):
            torch.save(tensors, tmp_path / name)
    else:
        sharded(tmp_path, dict(zip(names, (ONE, TWO), strict=True)))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": names[0], "b.weight": names[1]}}))
    with (tmp_path / names[1]).open("r+b") as file:
        file.truncate((tmp_path / names[1]).stat().st_size - 1)
    with pytest.raises(MalformedFileError) as caught:
        keys_of(tmp_path)
    assert caught.value.path == str(tmp_path / names[1])


@pytest.mark.parametrize(
    "name",
    ["../m.safetensors", "..", "sub/m.safetensors", "..\\m.safetensors", "C:m.safetensors", "/m", "a\0"],
)
def test_a_name_outside_the_index_s_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sharded(folder, {"m-1.safetensors": ONE})
    make.write_safetensors(tmp_path / "m.safetensors", TWO, None)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "m-1.safetensors", "b.weight": name}}))
    with pytest.raises(MalformedFileError, match="names 1 files that do not lie in its own folder") as caught:
        keys_of(folder)
    assert caught.value.keys == (name,)


@pytest.mark.parametrize("text", ["[1]", "{", '"x"', "[" * 100_000])
def test_a_damaged_configuration_is_named(text: str, tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "model.safetensors", ONE, None)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MalformedFileError, match=r"config\.json: the configuration"):
        keys_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../m.safetensors"}}']
)
def test_an_index_that_names_no_files_beside_it_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MalformedFileError, match="the index"):
        keys_of(tmp_path)


def test_a_diffusers_folder_has_a_part_for_each_network(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 64}')
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    sharded(tmp_path / "unet", {"d-1.safetensors": ONE, "d-2.safetensors": TWO}, "diffusion_pytorch_model")
    make.write_safetensors(tmp_path / "text_encoder" / "model.safetensors", TWO, None)
    # The same weights in one file, as some repositories have them beside.
    make.write_safetensors(tmp_path / "whole.safetensors", ONE, None)
    found = keys_of(tmp_path)
    assert {name: list(part) for name, part in found.parts.items()} == {
        "text_encoder": ["b.weight"],
        "unet": ["a.weight", "a.bias", "b.weight"],
    }
    assert found.indices == {"unet": "unet/diffusion_pytorch_model.safetensors.index.json"}
    assert found.configs == {"text_encoder": {}, "unet": {"sample_size": 64}}
    assert [(shard.part, shard.name) for shard in found.shards] == [
        ("text_encoder", "text_encoder/model.safetensors"),
        ("unet", "unet/d-1.safetensors"),
        ("unet", "unet/d-2.safetensors"),
    ]
    assert found.beside == (
        *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "whole.safetensors"),
    )
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "whole.safetensors").unlink()
    assert set(keys_of(tmp_path).parts) == {"text_encoder", "unet"}


def test_of_several_files_a_library_s_own_name_is_taken_and_safetensors_before_pickles(
    tmp_path: Path,
) -> None:
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    assert list(keys_of(tmp_path).parts[""]) == ["b.weight"]
    make.write_safetensors(tmp_path / "model.fp16.safetensors", {"half": torch.zeros(1)}, None)
    assert list(keys_of(tmp_path).parts[""]) == ["half"]
    make.write_safetensors(tmp_path / "model.safetensors", ONE, None)
    make.write_safetensors(tmp_path / "adapter.safetensors", TWO, None)
    (tmp_path / "config.json").write_text("{}")
    assert list(keys_of(tmp_path).parts[""]) == list(ONE)


@pytest.mark.parametrize("variant", ["m.safetensors.index.fp16.json", "m.fp16.safetensors.index.json"])
def test_a_variant_s_index_counts_where_there_is_no_plain_one(variant: str, tmp_path: Path) -> None:
    """Both spellings: diffusers and transformers put the variant before .json, others before the suffix."""
    variant = variant.replace("m.", "diffusion_pytorch_model.")
    half = {"diffusion_pytorch_model.fp16-00001-of-00002.safetensors": ONE, "x-2.safetensors": TWO}
    sharded(tmp_path, half).rename(tmp_path / variant)
    found = keys_of(tmp_path)
    assert list(found.parts[""]) == [*ONE, *TWO]
    assert (found.indices, found.beside) == ({"": variant}, ())
    make.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {"whole": torch.zeros(1)}, None)
    found = keys_of(tmp_path)
    assert list(found.parts[""]) == ["whole"]
    assert found.beside == tuple(sorted([variant, *half]))


def test_a_shard_alone_is_no_model(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "model-00001-of-00002.safetensors", ONE, None)
    with pytest.raises(MissingFileError, match="one of 2 shards, without an index"):
        keys_of(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert list(keys_of(tmp_path).parts[""]) == list(ONE)


def test_several_files_of_no_known_name_have_to_be_named(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "x.safetensors", ONE, None)
    assert list(keys_of(tmp_path).parts[""]) == list(ONE)
    make.write_safetensors(tmp_path / "y.safetensors", TWO, None)
    with pytest.raises(MissingFileError, match="2 files of weights") as caught:
        keys_of(tmp_path)
    assert caught.value.keys == ("x.safetensors", "y.safetensors")


def test_a_configuration_names_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(MissingFileError, match=r"weights are needed, or their index"):
            keys_of(path)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="holds no weights"):
        keys_of(tmp_path)
    with pytest.raises(MissingFileError, match="no such file"):
        keys_of(tmp_path / "absent.safetensors")
    with pytest.raises(MissingFileError, match="no such file"):
        keys_of(tmp_path / "absent.safetensors.index.json")


def test_headers_alone_are_read_and_torch_is_not(tmp_path: Path) -> None:
    """The data of the file is a hole: a terabyte that cannot be read in this time, nor held in memory."""
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}})
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    try:
        with file.open("r+b") as stream:
            stream.truncate(8 + len(header) + 2**40)
    except OSError:
        pytest.skip("this file system has no sparse files of a terabyte")
    code = (
        "import sys\nfrom loratools.io.base import Base, Shard, keys_of\n"
        f"assert keys_of({str(file)!r}).parts['']['a.weight'].shape == (2**20, 2**18)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    with pytest.raises(MalformedFileError, match="GGUF"):
        keys_of(tmp_path / "model.gguf")
