import json
import os

import pytest
import torch

import loratools as lt
from loratools.ops import extract as operation
from tests.cli.running import invoke
from tests.ops import sd15_checkpoints
from tests.report.checkpoint_samples import extract_report


def run(*arguments):
    return invoke("extract", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract")
    before = sd15_checkpoints.tensors(torch.float32)
    draw = torch.Generator().manual_seed(5)
    after = {}
    for key, tensor in before.items():
        rows = tensor.flatten(1)
        change = torch.randn(len(rows), 2, generator=draw) @ torch.randn(2, rows.shape[1], generator=draw)
        after[key] = tensor + 0.01 * change.reshape(tensor.shape)
    return (
        sd15_checkpoints.safetensors(folder / "base.safetensors", before),
        sd15_checkpoints.pickle(folder / "tuned.ckpt", after),
    )


@pytest.fixture
def asked(monkeypatch):
    """What the operation was called with; it does nothing."""
    found = {}

    def extract(base, tuned, output, **options):
        found.update(base=base, tuned=tuned, output=output, **options)
        return None, extract_report(output=output)

    monkeypatch.setattr(operation, "extract", extract)
    monkeypatch.setattr(operation, "default_output", lambda tuned, **rule: f"{tuned}-named")
    return found


def test_options_reach_the_operation(asked):
    result = run(
        *("base", "tuned", "-o", "out", "--energy", "0.9", "--max-rank", "64", "--min-rank", "2"),
        *("--conv-rank", "0", "--components", "denoiser", "--include", "attn", "--include", "ff"),
        *("--exclude", r"ff\.net", "--embeddings", "--full-small", "--svd", "exact", "--tolerance", "0.01"),
        *("--seed", "3", "--to", "peft", "--dtype", "float16", "--device", "cpu", "--arch", "sd15"),
        *("--overwrite", "--dry-run"),
    )
    assert result.exit_code == 0, result.stderr
    given = {name: value for name, value in asked.items() if value is not None}
    assert given == {
        "base": "base",
        "tuned": "tuned",
        "output": "out",
        "energy": 0.9,
        "max_rank": 64,
        "min_rank": 2,
        "conv_rank": 0,
        "components": ("denoiser",),
        "include": ("attn", "ff"),
        "exclude": (r"ff\.net",),
        "embeddings": True,
        "full_small": True,
        "svd": "exact",
        "tolerance": 0.01,
        "seed": 3,
        "to": "peft",
        "dtype": "float16",
        "device": "cpu",
        "arch": "sd15",
        "overwrite": True,
        "dry_run": True,
        "resume": False,
    }


def test_the_rank_is_32_where_no_rule_is_given(asked):
    assert run("base", "tuned").exit_code == 0
    assert asked["rank"] == 32
    assert asked["output"] == "tuned-named"
    assert run("base", "tuned", "--size", "20MB").exit_code == 0
    assert (asked["rank"], asked["size"]) == (None, "20MB")


@pytest.mark.parametrize("text", ["20MB", "1.5GB", "64 MiB", "64kib", "1000", "1000B"])
def test_sizes_that_are_let_through_can_be_read(asked, text):
    from loratools.maths.rank import parse_size

    assert run("base", "tuned", "--size", text).exit_code == 0
    assert parse_size(text) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", "4", "--energy", "0.9"), "--rank and --energy exclude each other"),
        (("--size", "1MB", "--error", "0.1"), "--error and --size exclude each other"),
        (("--rank", "0"), "'--rank'"),
        (("--energy", "0"), "'--energy'"),
        (("--energy", "1.5"), "'--energy'"),
        (("--error", "1"), "'--error'"),
        (("--ratio", "nan"), "not a finite number above 0"),
        (("--ratio", "-1"), "not a finite number above 0"),
        (("--size", "big"), "'big' is no size"),
        (("--size", "20XB"), "'20XB' is no size"),
        (("--size", "20M"), "'20M' is no size"),
        (("--min-rank", "8", "--max-rank", "4"), "--min-rank 8 is more than --max-rank 4"),
        (("--conv-rank", "-1"), "'--conv-rank'"),
        (("--include", "("), "'(' is no regular expression"),
        (("--exclude", "a", "--exclude", "*"), "'*' is no regular expression"),
        (("--svd", "fast"), "'--svd'"),
        (("--tolerance", "0"), "'--tolerance'"),
        (("--to", "koyha"), "Did you mean kohya?"),
        (("--components", ",a"), "has an empty name"),
    ],
)
def test_wrong_usage_is_exit_status_2(asked, arguments, message):
    result = run("base", "tuned", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not asked


def test_an_extraction_bakes_back(made, tmp_path):
    lora, baked = tmp_path / "lora.safetensors", tmp_path / "baked.safetensors"
    result = run(*made, "--rank", "2", "-o", lora, "--components", "denoiser,text_encoder")
    assert result.exit_code == 0, result.stderr
    assert lt.load(lora).arch == "sd15"
    assert invoke("bake", made[0], lora, "-o", baked, "--quiet").exit_code == 0
    result = invoke("verify", made[0], lora, baked)
    assert result.exit_code == 0, result.stdout


def test_the_default_output_is_named_after_tuned_in_the_current_folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*made, "--rank", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert os.listdir(tmp_path) == ["tuned-lora-r2.safetensors"]
    found = json.loads(result.stdout)
    assert found["bytes"] == os.path.getsize("tuned-lora-r2.safetensors")
    assert found["ranks"] == {"2": len(found["modules"])}
    assert found["rule"] == "rank 2"


def test_a_dry_run_writes_nothing(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*made, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert not os.listdir(tmp_path)


def test_two_equal_checkpoints_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(made[0], made[0])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert not os.listdir(tmp_path)
