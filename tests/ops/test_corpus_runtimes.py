"""Every language, speech and vision adapter of the reference data, in the form of every program and back.

What each is for is written down here, as is what must become of it in each program. ΔW is compared by matrix products
of this file's own, in float64, of what the first and the last file hold; nothing of loratools' proof is used.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import loratools as lt
from loratools.model import Adapter
from loratools.ops import files
from loratools.ops.doctor_results import DoctorReport
from tests.cli.running import invoke

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the folder of reference data is not beside it")

# The inventory's labels of files of language, speech and vision models; and those of image models among them.
LAYOUTS = (
    *("peft-lora", "peft-lora-pickle", "peft-adalora", "peft-unilora", "peft-ia3", "peft-prefix_tuning"),
    *("peft-prompt_tuning", "mlx-npz", "mlx-safetensors", "loralib-like", "custom-w_a_b", "adapterhub"),
)
IMAGE = "UNet"
PROGRAMS = ("vllm", "sglang", "lorax", "llama.cpp", "mlx", "peft")
SERVING = PROGRAMS[:-1]
FORMS = ("torchtune", "loralib", "gguf")
# What a file is written as; everything else is a folder.
SUFFIXES = {"llama.cpp": ".gguf", "gguf": ".gguf", "loralib": ".safetensors"}
# Copies of these lie in no file over this many bytes; larger ones would make the tests slow.
LARGEST = 60_000_000
# Relative to ‖ΔW · x‖: products of the same numbers in another order, and of numbers rounded once to float32.
EXACT, ROUNDED = 1e-12, 1e-6

GPT2 = {"model_type": "gpt2", "n_head": 6, "n_layer": 6, "n_embd": 384}
NAMELESS = {"model_type": "gpt2", "n_head": 12, "n_layer": 12, "n_embd": 768}
BERT = {"model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "hidden_size": 768}
MISTRAL = {
    **{"model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_hidden_layers": 32, "hidden_size": 4096},
}
QWEN = {
    **{"model_type": "qwen2", "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"num_hidden_layers": 24, "hidden_size": 896, "tie_word_embeddings": True},
}
TINYLLAMA = {
    **{"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"num_hidden_layers": 22, "hidden_size": 2048},
}
GPT_NEO = {"model_type": "gpt_neo", "num_heads": 12, "num_layers": 12, "hidden_size": 768}
NO_NAME = "has no name for in gpt2 models"
NOT_DESCRIBED = "whose names are described"
ATTENTION = "other than those of attention, MLP and output"
SPEECH, VISION = "it is for a speech model", "it is for a vision model"
NO_LORA = "not a LoRA adapter"
NEEDS_BASE = "Kinds whose ΔW depends on the base weight need --base"
_IA3 = {
    **dict.fromkeys(FORMS, "names for the ia3_l"),
}
THETA = "save_indices=True"


class Case(NamedTuple):
    """What must become of one file of the reference data.

    Attributes:
        config: The base's config.json.
        refused: By program or layout, what the refusal has to say.
        whole: How many tensors were trained whole.
        kind: The kind of its modules.
        fit: The programs in which it works as it is.
    """

    config: Mapping[str, Any]
    refused: Mapping[str, str] = {}
    whole: int = 0
    kind: str = "lora"
    fit: tuple[str, ...] = ()


ALL = ("vllm", "sglang", "lorax", "peft")
_TORCHTUNE = {"torchtune": ATTENTION}
_VISION = {**dict.fromkeys(SERVING, VISION), **_TORCHTUNE, "gguf": NOT_DESCRIBED}
_NONE = dict.fromkeys((*PROGRAMS, *FORMS), NO_LORA)
# By what is in the path of a file; the first that fits counts.
CASES: Mapping[str, Case] = {
    "adapterhub": Case({}, _NONE),
    "Sam_LoRA": Case({"model_type": "sam"}, _VISION),
    "vl-fastapi-app": Case(GPT2, _TORCHTUNE),
    "learn-lora": Case(NAMELESS, {**dict.fromkeys(("llama.cpp", "gguf"), NO_NAME), **_TORCHTUNE}),
    "clip-lora": Case(BERT, _TORCHTUNE),
    "MLX_Model": Case(MISTRAL),
    "mlx-lm": Case(QWEN, fit=("mlx",)),
    "RoBERTa-LoRA": Case({**BERT, "model_type": "roberta"}, _TORCHTUNE, 4, "adalora", ("peft",)),
    "ia3_conv2d": Case(BERT, {**dict.fromkeys(SERVING, NEEDS_BASE), **_IA3}, 0, "ia3", ("peft",)),
    "age_prediction": Case({"model_type": "vit"}, _VISION, 2, fit=("peft",)),
    # Whoever copied it left it with a name that no program looks for.
    "Copy of": Case(GPT_NEO, {**dict.fromkeys(("llama.cpp", "gguf"), NOT_DESCRIBED), **_TORCHTUNE}),
    "Bert_project2": Case({**BERT, "model_type": "roberta"}, _TORCHTUNE, 4, fit=("peft",)),
    "whisper": Case(
        {"model_type": "whisper", "num_hidden_layers": 6},
        {
            **dict.fromkeys(("sglang", "lorax", "llama.cpp", "mlx"), SPEECH),
            **_TORCHTUNE,
            "gguf": NOT_DESCRIBED,
        },
        fit=("vllm", "peft"),
    ),
    "poem-generator": Case(TINYLLAMA, fit=ALL),
    "prefix_tuning": Case({}, _NONE),
    "prompt_tuning": Case({}, _NONE),
    "unilora": Case(
        {**BERT, "model_type": "roberta"}, dict.fromkeys((*SERVING, *FORMS), THETA), 0, "unilora", ("peft",)
    ),
}


def inventory() -> list[dict[str, str]]:
    if not CORPUS.is_dir():
        return []
    with open(CORPUS / "INVENTORY.tsv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [row for row in rows if row["layout"] in LAYOUTS and IMAGE not in row["base_arch"]]


ROWS = inventory()


def case_of(row: Mapping[str, str]) -> Case:
    return next(case for words, case in CASES.items() if words in row["path"])


def named(row: Mapping[str, str]) -> str:
    return row["path"].rpartition("/")[0][-40:] or row["path"]


def base_of(folder: Path, case: Case) -> Path:
    """The base as far as any program's form needs it: its configuration."""
    path = folder / "base"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "toy", **case.config}), "utf-8")
    return path


def changes(adapter: Adapter) -> dict[str, np.ndarray]:
    """ΔW · x of every weight, in float64, of x that depends on the width alone; weights that stay are left out."""
    found: dict[str, np.ndarray] = {}
    for target, module in adapter.modules.items():
        up, down = (module.factors[role].load().double() for role in ("up", "down"))
        if module.kind == "adalora":
            down = module.factors["lora_E"].load().double() * down
        draw = torch.Generator().manual_seed(down.shape[1])
        x = torch.randn(down.shape[1], 3, generator=draw, dtype=torch.float64)
        y = (module.scale * (up @ (down @ x))).numpy()
        spans, shares = (target.rows.spans, target.rows.of) if target.rows is not None else (((0, 1),), 1)
        share = len(y) // sum(end - start for start, end in spans)
        whole = found.setdefault(target.path, np.zeros((share * shares, 3)))
        rows = [row for start, end in spans for row in range(start * share, end * share)]
        whole[rows] += y
    return {path: y for path, y in found.items() if y.any()}


def bare(paths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By names without the model's outermost, which llama.cpp has none for."""
    return {path[path.index("encoder.") :] if "encoder." in path else path: y for path, y in paths.items()}


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], allowed: float) -> None:
    assert found.keys() == wanted.keys()
    for path, y in wanted.items():
        assert np.linalg.norm(found[path] - y) <= allowed * np.linalg.norm(y), path


def convert(source: Path, to: str, output: Path, *options: object) -> tuple[int, dict[str, Any], str]:
    """A conversion by the command line: its status, its report, and what it says of a refusal."""
    result = invoke("convert", source, "-o", output, "--to", to, *options, "--json")
    report = json.loads(result.stdout) if result.exit_code == 0 else {}
    return result.exit_code, report, " ".join(result.stderr.split())


def options_for(case: Case, to: str, folder: Path) -> list[object]:
    """What a conversion needs beside the base: a place for heads that were trained whole, and LoRA of other kinds."""
    whole: list[object] = []
    if case.whole and to in SERVING:
        whole = ["--full-weights", folder / f"{to}-full.safetensors"]
    elif case.whole and to in FORMS:
        whole = ["--drop", "extras"]
    kind = ["--as", "lora"] if case.kind != "lora" and to in FORMS and case.kind != "ia3" else []
    return [*whole, *kind]


def source_of(row: Mapping[str, str]) -> Path:
    path = CORPUS / row["path"]
    if path.stat().st_size > LARGEST:
        pytest.skip(f"it has more than {LARGEST} bytes, which would take too long here")
    return path


def as_read(path: Path) -> Adapter:
    return files.load(path, embedded=True)


def test_the_files_are_all_told_apart() -> None:
    assert ROWS
    assert {words for words in CASES if any(words in row["path"] for row in ROWS)} == set(CASES)
    assert all(any(words in row["path"] for words in CASES) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_it_goes_into_every_form_and_back(row: Mapping[str, str], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source, case = source_of(row), case_of(row)
    base, done = base_of(tmp_path, case), []
    for to in (*PROGRAMS, *FORMS):
        output = tmp_path / f"{to}{SUFFIXES.get(to, '')}"
        status, report, said = convert(source, to, output, "--base", base, *options_for(case, to, tmp_path))
        if to in case.refused:
            assert status == 1, to
            assert case.refused[to] in said, to
            assert not output.exists()
            continue
        assert status == 0, (to, said)
        assert report["verified"]["error"] <= ROUNDED
        if to in PROGRAMS:
            assert lt.doctor(output, runtime=to, values=False).ok, to
        whole = tmp_path / f"{to}-full.safetensors"
        assert whole.exists() == bool(case.whole and to in SERVING)
        if case.kind in ("lora", "adalora"):
            check_back(source, output, to, base, tmp_path / f"{to}-back", case)
        done.append(to)
    assert done or NO_LORA in case.refused.values()


def check_back(source: Path, output: Path, to: str, base: Path, back: Path, case: Case) -> None:
    """Back to PEFT: ΔW is what it was, unless a scale had to go into the factors."""
    status, _, said = convert(output, "peft", back, "--base", base)
    assert status == 0, (to, said)
    first, last = changes(as_read(source)), changes(as_read(back))
    if to in ("llama.cpp", "gguf"):
        first, last = bare(first), bare(last)
    assert_same(last, first, ROUNDED if case.kind == "adalora" or to == "loralib" else EXACT)


def command_of(report: DoctorReport) -> str:
    """The one command that mends all that keeps an adapter from working; empty where there is none."""
    commands = {each.command for each in report.findings if each.severity == "error" and each.command}
    assert len(commands) <= 1, commands
    return commands.pop() if commands else ""


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_what_doctor_says_to_run_makes_it_fit(
    row: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    source, case = source_of(row), case_of(row)
    monkeypatch.chdir(tmp_path)
    base_of(tmp_path, case).rename("BASE")
    # Doctor's commands write beside the adapter.
    adapter = tmp_path / "adapter" / source.name
    adapter.parent.mkdir()
    for each in source.parent.iterdir():
        if each.is_file():
            (adapter.parent / each.name).write_bytes(each.read_bytes())
    for to in PROGRAMS:
        report = lt.doctor(adapter, runtime=to, values=False)
        assert report.ok == (to in case.fit), (to, report.findings)
        command = command_of(report)
        refused = case.refused.get(to)
        if report.ok or not command:
            # What cannot be mended says why, and what to do instead.
            assert report.ok or refused, to
            assert all(each.mend for each in report.findings if each.severity == "error"), to
            continue
        _, name, *arguments = shlex.split(command)
        assert (name == "bake") == (case.kind == "ia3"), command
        if name == "bake":
            continue
        result = invoke(name, *arguments)
        if refused:
            assert refused in " ".join(result.stderr.split()), to
            continue
        assert result.exit_code == 0, (to, command, result.stderr)
        assert lt.doctor(arguments[arguments.index("-o") + 1], runtime=to, values=False).ok, to
