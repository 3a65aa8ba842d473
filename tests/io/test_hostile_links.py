"""Links in the folder of a model or an adapter: within it, and into a download's cache; nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import loratools as lt
from loratools.errors import LoraError, MalformedFileError
from loratools.io.base import config_of, keys_of
from tests import factories as make

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")

INDEX = "model.safetensors.index.json"


def shard(path: Path) -> Path:
    make.write_safetensors(path, {"a.weight": torch.ones(2, 3)}, None)
    return path


def sharded(folder: Path, name: str = "m-1.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    return folder


@pytest.mark.parametrize("by_index", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(
    by_index: bool, absolute: bool, tmp_path: Path
) -> None:
    secret = shard(tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "model")
    (folder / "m-1.safetensors").symlink_to(secret if absolute else Path("..", secret.name))
    with pytest.raises(MalformedFileError, match="a link leads to") as caught:
        keys_of(folder / INDEX if by_index else folder)
    assert str(secret) in str(caught.value)
    assert caught.value.path == str(folder / "m-1.safetensors")


def test_a_link_by_a_link_is_followed_to_its_end(tmp_path: Path) -> None:
    secret = shard(tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "model")
    (folder / "inner").symlink_to(tmp_path)
    (folder / "m-1.safetensors").symlink_to(Path("inner", secret.name))
    with pytest.raises(MalformedFileError, match="a link leads to"):
        keys_of(folder)


def test_a_link_within_the_folder_is_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    shard(folder / "deep" / "real.safetensors")
    (folder / "m-1.safetensors").symlink_to(Path("deep", "real.safetensors"))
    assert list(keys_of(folder).parts[""]) == ["a.weight"]


@pytest.mark.parametrize("shared", [True, False])
def test_the_hub_s_cache_is_read(shared: bool, tmp_path: Path) -> None:
    """``snapshots/COMMIT/FILE`` to ``blobs/HASH``, which may be a link to the blobs that all repositories share."""
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = sharded(repository / "snapshots" / "0123", "m-1.safetensors")
    blob = repository / "blobs" / "ab12"
    blob.parent.mkdir()
    if shared:
        real = shard(tmp_path / "cache" / "blobs" / "cd" / "cd34")
        blob.symlink_to(Path("..", "..", "blobs", "cd", "cd34"))
        assert blob.resolve() == real
    else:
        shard(blob)
    config = repository / "blobs" / "ef56"
    config.write_text('{"model_type": "llama"}')
    (snapshot / "m-1.safetensors").symlink_to(Path("..", "..", "blobs", "ab12"))
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", "ef56"))
    (snapshot / "unet").mkdir()
    (snapshot / "unet" / "notes.txt").symlink_to(Path("..", "..", "..", "blobs", "ef56"))
    found = keys_of(snapshot)
    assert list(found.parts[""]) == ["a.weight"]
    assert found.configs == {"": {"model_type": "llama"}}
    assert found.beside == ("config.json", "unet/notes.txt")
    through = tmp_path / "link"
    through.symlink_to(snapshot)
    assert list(keys_of(through).parts[""]) == ["a.weight"]


def test_a_snapshot_s_link_past_the_blobs_is_refused(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = sharded(repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab12").symlink_to(shard(tmp_path / "secret.safetensors"))
    (snapshot / "m-1.safetensors").symlink_to(Path("..", "..", "blobs", "ab12"))
    with pytest.raises(MalformedFileError, match="a link leads to"):
        keys_of(snapshot)


def test_a_configuration_and_what_lies_beside_the_weights_may_not_lead_elsewhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"model_type": "llama"}')
    folder = tmp_path / "model"
    shard(folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        link = folder / name
        link.symlink_to(secret)
        with pytest.raises(MalformedFileError, match="a link leads to") as caught:
            keys_of(folder)
        assert caught.value.path == str(link)
        link.unlink()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(MalformedFileError, match="a link leads to"):
        config_of(folder)


def test_a_folder_of_a_pipeline_may_not_lie_elsewhere(tmp_path: Path) -> None:
    shard(tmp_path / "elsewhere" / "diffusion_pytorch_model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MalformedFileError, match="a link leads to"):
        keys_of(folder)
    (folder / "unet").unlink()
    (tmp_path / "elsewhere").rename(folder / "real")
    (folder / "unet").symlink_to("real")
    assert {name: list(part) for name, part in keys_of(folder).parts.items()}["unet"] == ["a.weight"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_s_folder_may_not_lead_elsewhere(name: str, tmp_path: Path) -> None:
    made = make.peft(tmp_path / "adapter")
    (made.path / name).rename(tmp_path / name)
    (made.path / name).symlink_to(tmp_path / name)
    with pytest.raises(MalformedFileError, match="a link leads to"):
        lt.load(made.path)


def test_a_path_that_the_user_gives_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "real" / "style.safetensors")
    link = tmp_path / "style.safetensors"
    link.symlink_to(made.path)
    assert lt.load(link).modules
    shard(tmp_path / "real" / "model.safetensors")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "real" / "model.safetensors")
    assert list(keys_of(tmp_path / "model.safetensors").parts[""]) == ["a.weight"]


def test_links_that_lead_to_themselves_are_missing_files(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "m-1.safetensors").symlink_to("m-1.safetensors")
    with pytest.raises(LoraError, match="shards are missing"):
        keys_of(folder)
