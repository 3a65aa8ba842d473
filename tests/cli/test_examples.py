"""The examples of doctor, convert and pack, in their help and in the README: real commands, that do what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import factories as make
import pytest

from tests.cli.render_docs import help_of
from tests.cli.running import invoke
from tests.ops.doctoring import base

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("doctor", "convert", "pack")
CONFIG = {
    **{"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


def examples() -> list[str]:
    """Every command line that is shown, without what is said of it."""
    shown = [line for name in COMMANDS for line in help_of(name).partition("Examples:")[2].splitlines()] + (
        ROOT / "README.md"
    ).read_text("utf-8").splitlines()
    lines = [line.partition(" #")[0].strip() for line in shown]
    wanted = re.compile(rf"loratools ({'|'.join(COMMANDS)}) [^`…]*")
    return list(dict.fromkeys(line for line in lines if wanted.fullmatch(line) and "--help" not in line))


def flat(path: Path) -> None:
    """A language model's adapter whose names have lost their dots."""
    tensors = {}
    for name, shape in make.LLAMA:
        stem = f"lora_unet_{name.replace('.', '_')}"
        up, down = (make.torch.ones(shape[0], 2), make.torch.ones(2, shape[1]))
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    make.write_safetensors(path, tensors, None)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the examples name."""
    make.kohya(tmp_path / "style.safetensors", "sd15")
    make.kohya(tmp_path / "lokr.safetensors", "sd15", kind="lokr")
    make.diffusers(tmp_path / "pytorch_lora_weights.safetensors", "sd15")
    make.diffusers(tmp_path / "IN", "sd15", only=["attn"])
    flat(tmp_path / "flat.safetensors")
    for name in ("peft_folder", "adapters/one", "adapters/two", "more/style"):
        make.peft(tmp_path / name, seed=len(name))
    for name in ("model_folder", "model"):
        (tmp_path / name).mkdir()
        base(tmp_path / name)
        (tmp_path / name / "base.safetensors").rename(tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output_of(arguments: list[str]) -> str:
    return arguments[arguments.index("-o") + 1] if "-o" in arguments else ""


def test_there_are_examples_of_each() -> None:
    for name in COMMANDS:
        assert len([line for line in examples() if line.startswith(f"loratools {name} ")]) > 2


@pytest.mark.parametrize("line", examples())
def test_it_runs(line: str, there: Path) -> None:
    if " --to gguf" in line:
        pytest.importorskip("gguf")
    _, *arguments = shlex.split(line)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    output = output_of(arguments)
    if output:
        assert (there / output).exists()
    if "--json" in arguments:
        json.loads(result.stdout)
    if arguments[0] == "pack" and "--shared-basis" in arguments:
        shutil.rmtree(there / "adapters")
        assert invoke("unpack", output, "-o", "single").exit_code == 0
