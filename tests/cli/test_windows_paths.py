"""Names that Windows has no file of, and paths as it writes them; checked on every system."""

import json
import ntpath
import os
import posixpath
import sys
from pathlib import Path

import factories
import pytest
import torch

from loratools.io import names, storage
from loratools.ops import _outputs
from tests.cli.running import invoke


@pytest.mark.parametrize(
    "name",
    [
        "CON",
        "nul",
        "aux.safetensors",
        "Com1.tar.gz",
        "lpt9",
        "COM².txt",
        "prn .bin",
        "conin$",
        "a.safetensors.",
        "a ",
    ]
    + [f"a{char}b" for char in '<>:"/\\|?*\x00\x1f\n'],
)
def test_a_name_that_windows_has_no_file_of_is_told_and_mended(name):
    assert names.refusal(name)
    mended = names.portable(name)
    assert not names.refusal(mended)
    assert names.portable(mended) == mended


@pytest.mark.parametrize(
    "name",
    [
        "a.safetensors",
        "console",
        "com10",
        "null.bin",
        "aux_.txt",
        "模型 é.safetensors",
        ".hidden",
        "a b",
        "COM",
        ".",
    ],
)
def test_other_names_are_fine(name):
    assert not names.refusal(name)


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("style", "style"),
        ("模型 é", "模型 é"),
        ("e\u0301", "é"),
        ("aux.v2", "aux_.v2"),
        ("NUL", "NUL_"),
        ("a:b\\c/d\x1b", "a_b_c_d_"),
        ("../../etc", "_.._etc"),
        ("...", "_"),
        ("", "_"),
        (" a. ", "a"),
        ("a\ud800", "a_"),
    ],
)
def test_a_portable_name_is_as_like_as_can_be(name, portable):
    assert names.portable(name) == portable


def test_long_names_stay_apart():
    long = ["é" * 200 + end for end in "ab"]
    first, second = map(names.portable, long)
    assert first != second
    assert all(len(each.encode()) <= 180 for each in (first, second))


def test_names_that_some_systems_take_for_one_are_told_apart():
    wanted = ["Style", "style", "STYLE", "style-2", "stra\u00dfe", "strasse", "e\u0301", "é"]
    found = names.distinct(wanted)
    assert len({name.casefold() for name in found}) == len(wanted)
    assert found[:3] == ["Style", "style-2", "STYLE-3"]


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(_outputs, "_WINDOWS", True)


@pytest.fixture
def flux(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return factories.kohya(tmp_path / "flux.safetensors", "flux").path


SIDES = {"A": (2, 32), "B": (32, 2)}
REFUSED = [
    "aux.safetensors",
    "out.safetensors:stream",
    "a|b.safetensors",
    "out.safetensors.",
    "C:nul",
    "x\\con",
]


@pytest.mark.parametrize("goal", REFUSED)
@pytest.mark.parametrize("command", ["convert", "merge", "pack"])
def test_windows_is_not_asked_for_what_it_cannot_write(windows, flux, command, goal):
    inputs = {"convert": ["FLUX", "--to", "comfy"], "merge": ["FLUX", "FLUX"], "pack": ["FLUX"]}[command]
    result = invoke(command, *(flux if each == "FLUX" else each for each in inputs), "-o", goal)
    assert result.exit_code == 1
    assert f"Error: {goal}: Windows can give no file this name: " in result.stderr
    assert "Choose another name, such as " in result.stderr
    assert [each.name for each in Path().iterdir()] == ["flux.safetensors"]


@pytest.mark.parametrize("goal", ["out.safetensors", "./out.safetensors"])
def test_windows_is_asked_for_what_it_can_write(windows, flux, goal):
    assert invoke("convert", flux, "--to", "comfy", "-o", goal).exit_code == 0


@pytest.mark.parametrize(
    "target",
    [
        "\\\\?\\C:\\models\\out.safetensors",
        "\\\\server\\share\\out.safetensors",
        "C:out.safetensors",
        "C:/models/out",
        "C:\\models\\out\\",
        "..",
        "s3://bucket/a:b",
    ],
)
def test_paths_as_windows_writes_them_are_no_strange_names(windows, target):
    _outputs.check_system(target)


WITHIN = [
    (ntpath, "C:\\Base\\out", "c:\\base", True),
    (ntpath, "c:\\base", "C:\\BASE", True),
    (ntpath, "C:\\base-2", "C:\\base", False),
    (ntpath, "C:\\out", "C:\\", True),
    (ntpath, "D:\\base\\out", "C:\\base", False),
    (ntpath, "\\\\server\\share\\base\\out", "\\\\server\\share\\base", True),
    (ntpath, "\\\\?\\C:\\base\\out", "\\\\?\\C:\\base", True),
    (posixpath, "/base/out", "/base", True),
    (posixpath, "/base/out", "/", True),
    (posixpath, "/Base/out", "/base", False),
    (posixpath, "/base-2", "/base", False),
]


@pytest.mark.parametrize(("system", "path", "folder", "inside"), WITHIN)
def test_whether_a_path_lies_in_a_folder(system, path, folder, inside, monkeypatch):
    for name in ("normcase", "commonpath"):
        monkeypatch.setattr(_outputs.os.path, name, getattr(system, name))
    monkeypatch.setattr(_outputs.os.path, "realpath", str)
    assert _outputs.within(path, folder) is inside


@pytest.mark.parametrize(
    ("folder", "name", "path"),
    [
        ("\\\\?\\C:\\models", "unet/x.safetensors", "\\\\?\\C:\\models\\unet\\x.safetensors"),
        ("\\\\?\\UNC\\server\\share", "a/b/c", "\\\\?\\UNC\\server\\share\\a\\b\\c"),
        ("C:\\models\\", "x", "C:\\models\\x"),
        ("s3://bucket/models/", "unet/x", "s3://bucket/models/unet/x"),
    ],
)
def test_what_lies_below_a_folder_is_spelt_as_windows_has_it(folder, name, path, monkeypatch):
    monkeypatch.setattr(storage.os.path, "join", ntpath.join)
    assert storage.below(folder, name) == path


@pytest.fixture
def joined(monkeypatch):
    r"""Names that loratools joins to a folder and that hold a "/": below "\\\\?\\" Windows finds no file by them."""
    found = []
    join = os.path.join

    def noted(folder, *names):
        if sys._getframe(1).f_globals["__name__"].startswith("loratools."):
            found.extend(name for name in names if "/" in name.rstrip("/") and not os.path.isabs(name))
        return join(folder, *names)

    monkeypatch.setattr(os.path, "join", noted)
    return found


def test_nothing_is_joined_with_slashes_in_its_name(tmp_path, joined):
    base = tmp_path / "model"
    for part in ("unet", "vae"):
        (base / part).mkdir(parents=True)
        (base / part / "config.json").write_text("{}")
        (base / part / "deeper").mkdir()
        (base / part / "deeper" / "notes.md").write_text("")
    (base / "model_index.json").write_text('{"_class_name": "P", "unet": ["a", "b"], "vae": ["a", "b"]}')
    key, name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "one.safetensors"
    factories.write_safetensors(base / "unet" / name, {key: torch.ones(32, 32)}, None)
    index = json.dumps({"metadata": {}, "weight_map": {key: name}})
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    factories.write_safetensors(base / "vae" / "model.safetensors", {"x": torch.ones(2)}, None)
    lora = {f"unet.{key[:-7]}.lora_{side}.weight": torch.ones(*shape) for side, shape in SIDES.items()}
    factories.write_safetensors(tmp_path / "a.safetensors", lora, None)
    result = invoke(
        "bake", base, tmp_path / "a.safetensors", "-o", tmp_path / "baked", "--arch", "sd15", "--dry-run"
    )
    assert result.exit_code == 0, result.stderr
    result = invoke("bake", base, tmp_path / "a.safetensors", "-o", tmp_path / "baked", "--arch", "sd15")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "baked/unet/deeper/notes.md").is_file()
    factories.peft(tmp_path / "lib" / "deep" / "style", seed=1)
    for options in ((), ("--shared-basis", 2)):
        packed = tmp_path / f"packed{len(options)}"
        assert invoke("pack", tmp_path / "lib", "-o", packed, *options).exit_code == 0
        assert invoke("unpack", packed, "-o", f"{packed}-out").exit_code == 0
    assert joined == []


def test_a_pack_has_names_that_every_system_can_hold(tmp_path):
    library = tmp_path / "library"
    for number, name in enumerate(["aux", "Style", "style", "a:b|c", "dot."]):
        factories.peft(library / name, seed=number)
    assert invoke("pack", library, "-o", tmp_path / "packed").exit_code == 0
    found = [
        entry["name"] for entry in json.loads((tmp_path / "packed" / "index.json").read_text())["adapters"]
    ]
    assert len({name.casefold() for name in found}) == 5
    assert not any(names.refusal(name) for name in found)
    assert invoke("unpack", tmp_path / "packed", "-o", tmp_path / "out").exit_code == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(found)


def test_a_pack_of_another_system_is_unpacked_under_names_that_this_one_can_hold(tmp_path):
    factories.peft(tmp_path / "style", seed=1)
    assert invoke("pack", tmp_path / "style", "-o", tmp_path / "packed").exit_code == 0
    index = tmp_path / "packed" / "index.json"
    said = json.loads(index.read_text())
    said["adapters"][0]["name"] = "../../aux"
    index.write_text(json.dumps(said))
    assert invoke("unpack", tmp_path / "packed", "-o", tmp_path / "out").exit_code == 0
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["_.._aux"]
