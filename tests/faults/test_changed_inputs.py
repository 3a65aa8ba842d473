"""Every operation looks at each of its inputs again before an output takes its name, or a report is given."""

from __future__ import annotations

import os

import factories
import pytest

from loratools.io import unchanged
from tests.cli import checkpoint_files as make
from tests.cli.running import invoke

BESIDE = "m/config.json"
INDEX = "m/model.safetensors.index.json"
CASES = [
    ("merge a.safetensors b.safetensors -o out.safetensors", ["a.safetensors", "b.safetensors"]),
    ("merge p q -o p --overwrite", ["p/adapter_model.safetensors", "q/adapter_config.json"]),
    ("resize a.safetensors --rank 2 -o out.safetensors", ["a.safetensors"]),
    ("convert a.safetensors --to diffusers -o out.safetensors", ["a.safetensors"]),
    ("convert p --to peft --dtype bfloat16 -o out", ["p/adapter_config.json"]),
    ("bake base.safetensors a.safetensors -o out.safetensors", ["base.safetensors", "a.safetensors"]),
    ("bake base.safetensors a.safetensors -o base.safetensors --overwrite", ["base.safetensors"]),
    ("bake m a.safetensors -o out", ["m/model-00001-of-00002.safetensors", INDEX, BESIDE, "a.safetensors"]),
    ("bake m a.safetensors -o m --overwrite", ["m/model-00002-of-00002.safetensors"]),
    ("extract base.safetensors tuned.safetensors -o out.safetensors --rank 2", ["tuned.safetensors"]),
    ("extract m tuned.safetensors -o out.safetensors --rank 2", ["m/model-00001-of-00002.safetensors"]),
    ("verify base.safetensors a.safetensors tuned.safetensors", ["base.safetensors", "tuned.safetensors"]),
    ("compare p q", ["p/adapter_model.safetensors", "q/adapter_model.safetensors"]),
    ("info a.safetensors", ["a.safetensors"]),
    ("pack p q -o out", ["p/adapter_model.safetensors", "q/adapter_config.json"]),
    ("pack a.safetensors b.safetensors -o out --to kohya", ["b.safetensors"]),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.standard(tmp_path)
    (tmp_path / BESIDE).write_text("{}")
    factories.peft(tmp_path / "p", seed=2)
    factories.peft(tmp_path / "q", seed=3)
    factories.kohya(tmp_path / "b.safetensors", "sd15", seed=4)
    return tmp_path


def changing(monkeypatch, path):
    """Have a file be rewritten, with the same content, right before inputs are looked at again."""
    real = unchanged.check

    def check():
        found = path.stat()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
        real()

    monkeypatch.setattr(unchanged, "check", check)


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, names in CASES for name in names], ids=str
)
def test_an_input_that_changes_is_refused(folder, monkeypatch, command, name):
    before = make.snapshot(folder)
    changing(monkeypatch, folder / name)
    result = invoke(*command.split())
    assert result.exit_code == 1, result.stdout
    assert f"{os.path.join(*name.split('/'))}: the file has changed while it was read" in result.stderr
    assert "fault in loratools" not in result.stderr
    assert make.snapshot(folder) == before


@pytest.mark.parametrize("command", [command for command, _ in CASES if not command.startswith("verify")])
def test_inputs_that_stay_are_none_the_worse(folder, command):
    result = invoke(*command.split())
    assert result.exit_code == 0, result.stderr
