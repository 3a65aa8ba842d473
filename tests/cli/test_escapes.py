"""Names, values and paths that would steer a terminal, hide, or be markup: shown as escapes wherever they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import factories
import pytest
import torch

from loratools.cli import output
from loratools.errors import LoraError, visible
from tests.cli.running import Terminal, invoke

ROOT = Path(__file__).resolve().parents[2]
# A colour, markup, a change of direction, another way to begin a control sequence, a line's end, DEL; and plain text.
EVIL = "\x1b[31m[red]\u202e\x9b2J\n\r\x07\x7f[/]中é"
SHOWN = r"\x1b[31m[red]\u202e\x9b2J\n\r\x07\x7f[/]中é"
# What may stand nowhere in an output but for the ends of lines.
HARMFUL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
LAYER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SHOWN),
        ("a\x00b\ud800c\udcffd", r"a\x00b\ud800c\udcffd"),
        ("\u2028\u2029\u200b\u00ad\ufeff\u2066\u0085", r"\u2028\u2029\u200b\xad\ufeff\u2066\x85"),
        ("模型 é ñ ﬁ 🎨 \u00a0\u3000", "模型 é ñ ﬁ 🎨 \u00a0\u3000"),
        # Joiners make one emoji of two, and words of some scripts; between letters of ours they hide.
        ("👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم"),
        ("to\u200d_q\u200c", r"to\u200d_q\u200c"),
        (r"C:\new\x1b", r"C:\new\x1b"),
        (7, "7"),
    ],
)
def test_what_steers_or_hides_is_visible_and_text_stays(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_errors_are_harmless_wherever_they_are_shown():
    error = LoraError(f"it is {EVIL}", path=EVIL, keys=[EVIL], candidates=[EVIL], expected=EVIL, todo=EVIL)
    assert not HARMFUL.search(str(error))
    assert "\n" not in str(error)
    assert str(error).count(SHOWN) == 6
    assert error.keys == (EVIL,)


def adapter(path, module, more=(), **metadata):
    """An adapter of a language model with one module."""
    tensors = {
        f"{LAYER}{module}.lora_A.weight": torch.eye(2, 4),
        f"{LAYER}{module}.lora_B.weight": torch.eye(4, 2),
        **dict.fromkeys(more, torch.ones(2)),
    }
    factories.write_safetensors(path, tensors, metadata)


def folder(path, module, **fields):
    """The same as PEFT has it."""
    adapter(path / "adapter_model.safetensors", module)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **fields}
    (path / "adapter_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of files with names in them that nobody would choose."""
    found = tmp_path_factory.mktemp("hostile")
    tags = json.dumps({"set": {EVIL: 3}})
    adapter(
        found / "a.safetensors", f"q_proj{EVIL}", ss_output_name=EVIL, ss_tag_frequency=tags, **{EVIL: EVIL}
    )
    adapter(found / "b.safetensors", "self_attn.q_proj", more=[EVIL])
    folder(found / "named", f"q_proj{EVIL}", base_model_name_or_path=EVIL, task_type=EVIL)
    folder(found / "plain", "self_attn.q_proj", base_model_name_or_path=EVIL, **{EVIL: EVIL})
    folder(found / "typed", "self_attn.q_proj", peft_type=EVIL, bias=EVIL)
    weight = "model.layers.0.self_attn.q_proj.weight"
    base = {weight: torch.ones(4, 4), f"model.{EVIL}.weight": torch.ones(3, 3)}
    factories.write_safetensors(found / "base.safetensors", base, {EVIL: EVIL})
    tuned = {key: 2 * tensor for key, tensor in base.items()} | {f"x{EVIL}": torch.ones(2)}
    factories.write_safetensors(found / "tuned.safetensors", tuned, None)
    (found / "mix.yaml").write_text(f"version: 1\nmethod: {json.dumps(EVIL)}\n{json.dumps(EVIL)}: 1\n")
    return found


COMMANDS = [
    "info a.safetensors",
    "info a.safetensors b.safetensors named typed --modules",
    "info .",
    "info base.safetensors",
    "doctor a.safetensors",
    "doctor typed",
    "doctor b.safetensors --for vllm",
    "convert a.safetensors -o out --to peft --dry-run",
    "convert b.safetensors -o out.safetensors --to kohya",
    "convert typed -o out --to vllm",
    "merge named a.safetensors -o out --dry-run",
    "merge b.safetensors b.safetensors -o out",
    "merge typed named -o out",
    "merge --recipe mix.yaml -o out",
    "compare a.safetensors b.safetensors --modules",
    "compare named typed",
    "resize named --rank 1 -o out --dry-run",
    "pack . -o out --dry-run",
    "pack . -o out --dry-run --skip-unfit",
    "bake base.safetensors plain -o out.safetensors --dry-run",
    "bake base.safetensors named -o out.safetensors",
    "extract base.safetensors tuned.safetensors --rank 1 -o out --dry-run",
    "verify base.safetensors plain tuned.safetensors",
    "verify base.safetensors named tuned.safetensors",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--threads=1", "--json"])
def test_no_command_prints_what_a_file_would_have_the_terminal_do(hostile, command, option, monkeypatch):
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke(*command.split(), option)
    assert isinstance(result.exception, SystemExit | None)
    assert "fault in loratools" not in result.stderr
    assert not HARMFUL.search(result.stdout + result.stderr)
    if option == "--json" and result.stdout:
        json.loads(result.stdout)
        assert result.stdout.isascii()


def test_metadata_is_shown_as_it_is_and_never_interpreted(hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("COLUMNS", "200")
    assert invoke("info", "a.safetensors", "--modules").stdout.count(SHOWN) >= 2
    assert SHOWN in invoke("convert", "b.safetensors", "-o", "o.safetensors", "--to", "kohya").stderr
    found = json.loads(invoke("info", "a.safetensors", "--json").stdout)
    assert found["metadata"][EVIL] == EVIL


ARGUMENTS = [[EVIL], ["info", f"--{EVIL}"], ["info", EVIL], ["info", "--arch", EVIL], ["unpack", "a", EVIL]]


@pytest.mark.parametrize("arguments", [*ARGUMENTS, ["merge", "a", "--weights", EVIL, "-o", "b"]])
def test_an_argument_is_repeated_visibly(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert r"\x1b[31m[red]\u202e" in result.stderr or arguments[0] == "unpack"
    assert not HARMFUL.search(result.stderr)
    assert len(result.stderr.splitlines()) == (1 if result.exit_code == 1 else 4)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_paths_are_shown_visibly_even_where_they_are_no_text(hostile, tmp_path):
    odd = b"\xff" + EVIL.replace("/", "").encode() + b".safetensors"
    (tmp_path / os.fsdecode(odd)).write_bytes((hostile / "a.safetensors").read_bytes())
    # Relative, since a long name's middle is left out where a line has no room for it.
    given = {"capture_output": True, "cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    for arguments in (["info", odd], ["info", ".", odd], ["info", odd, "--json"]):
        done = subprocess.run([sys.executable, "-m", "loratools", *arguments], **given)
        assert done.returncode == 0, done.stderr
        assert not HARMFUL.search((done.stdout + done.stderr).decode())
        assert rb"\udcff" in done.stdout


def test_a_traceback_is_harmless_too(hostile):
    command = [
        "convert",
        hostile / "b.safetensors",
        "-o",
        hostile / "o.safetensors",
        "--to",
        "kohya",
        "--debug",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *map(str, command)], capture_output=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert not HARMFUL.search(done.stderr.decode())
    assert SHOWN in done.stderr.decode()


def test_a_traceback_of_other_libraries_is_harmless_too(capsys):
    from loratools.cli import failures

    error = ValueError(f"{EVIL}\x00")
    failures.show_traceback(ValueError, error, None)
    found = capsys.readouterr().err
    assert not HARMFUL.search(found)
    assert r"\x1b[31m" in found


def test_the_bar_shows_names_visibly(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with output.progress("reading") as progress:
        progress(EVIL, 1, 2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "")
    assert r"\x1b[31m[red]\u202e" in shown
    assert not HARMFUL.search(shown)


def test_a_report_that_forgets_is_put_right(capsys):
    from rich.text import Text

    output.write_report(lambda _width, _symbols: Text(f"a{EVIL}b"))
    assert not HARMFUL.search(capsys.readouterr().out)
