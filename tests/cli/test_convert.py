import json
import os
import re
import subprocess
import sys

import factories
import pytest
import torch

import loratools as lt
from loratools.cli import output
from tests.cli.running import invoke

PRECIOUS = b"precious"


def run(*arguments):
    return invoke("convert", *arguments)


def words(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def flux(folder):
    return factories.kohya(folder / "flux.safetensors", "flux", alpha=3.0)


@pytest.fixture(scope="module")
def sd15(folder):
    token = {"bundle_emb.style.string_to_param.*": torch.ones(2, 8)}
    return factories.kohya(folder / "sd15.safetensors", "sd15", dora="out", extra=token)


@pytest.fixture(scope="module")
def lokr(folder):
    return factories.kohya(folder / "lokr.safetensors", "sd15", kind="lokr")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def test_the_change_of_every_weight_stays(flux, out):
    result = run(flux.path, "--to", "diffusers", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    made = lt.load(out)
    assert made.layout.name == "diffusers"
    factories.assert_close(factories.whole(made), factories.whole(lt.load(flux.path)))
    assert str(out) in "".join(result.stdout.split())


def test_a_report_says_what_became_of_the_tensors(flux, out):
    result = run(flux.path, "--to", "diffusers", "-o", out)
    for part in (
        "kohya to diffusers",
        "9, written as 16",
        "10 renamed, 8 split from fused weights, 9 kept in the metadata",
        "9 weights on random inputs, no difference",
    ):
        assert part in words(result.stdout)


def test_json_is_one_document_and_nothing_else(flux, out):
    result = run(flux.path, "--to", "diffusers", "-o", out, "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found.keys() == {
        "input", "output", "bytes", "dry_run", "arch", "from", "layout", "modules", "kinds", "ranks", "dtypes",
        "fates", "ledger", "tensors", "conversions", "verified", "dropped", "runtime",
        "normalised", "full_weights", "notes",
    }  # fmt: skip
    assert (found["input"], found["output"]) == (str(flux.path), str(out))
    assert (found["from"], found["layout"], found["arch"]) == ("kohya", "diffusers", "flux")
    assert found["bytes"] == out.stat().st_size
    assert found["dry_run"] is False
    assert found["modules"] == {"input": 9, "output": 16}
    assert found["kinds"] == {"lora": 16}
    assert found["fates"] == {"metadata": 9, "split": 8, "moved": 10}
    assert found["verified"] == {"weights": 9, "error": 0.0, "worst": found["verified"]["worst"]}
    assert found["dropped"] == []
    tensors, _ = factories.read_safetensors(flux.path)
    assert [entry["key"] for entry in found["ledger"]] == list(tensors)
    written, _ = factories.read_safetensors(out)
    assert {key for entry in found["ledger"] for key in entry["into"]} == written.keys()
    assert {entry["key"] for entry in found["tensors"]} == written.keys()
    assert all(entry.keys() == {"key", "fate", "into", "detail"} for entry in found["ledger"])


def test_quiet_is_silent(flux, out):
    result = run(flux.path, "--to", "comfy", "-o", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert out.exists()


def test_a_dry_run_proves_and_writes_nothing(flux, out):
    arguments = (flux.path, "--to", "comfy", "-o", out)
    planned = run(*arguments, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert "nothing was written" in run(*arguments, "--dry-run").stdout
    assert not os.listdir(out.parent)
    plan, done = json.loads(planned.stdout), json.loads(run(*arguments, "--json").stdout)
    assert plan["dry_run"] is True
    assert plan["verified"]["weights"] == 9
    assert plan["bytes"] == done["bytes"] == out.stat().st_size
    assert plan["ledger"] == done["ledger"]


def test_a_dry_run_refuses_what_a_run_would(sd15, out):
    planned = run(sd15.path, "--to", "diffusers", "-o", out, "--dry-run")
    assert planned.exit_code == 1
    assert planned.stderr == run(sd15.path, "--to", "diffusers", "-o", out).stderr
    out.write_bytes(PRECIOUS)
    assert run(sd15.path, "--to", "comfy", "-o", out, "--dry-run").exit_code == 1
    assert run(sd15.path, "--to", "comfy", "-o", out, "--dry-run", "--overwrite").exit_code == 0
    assert out.read_bytes() == PRECIOUS


def test_an_existing_output_is_refused(flux, out):
    out.write_bytes(PRECIOUS)
    result = run(flux.path, "--to", "comfy", "-o", out)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert out.read_bytes() == PRECIOUS
    assert run(flux.path, "--to", "comfy", "-o", out, "--overwrite").exit_code == 0
    assert lt.load(out).layout.name == "comfy"


def test_the_output_may_be_the_input(flux, out):
    out.write_bytes(flux.path.read_bytes())
    assert run(out, "--to", "comfy", "-o", out).exit_code == 1
    assert out.read_bytes() == flux.path.read_bytes()
    assert run(out, "--to", "comfy", "-o", out, "--overwrite").exit_code == 0
    assert os.listdir(out.parent) == [out.name]
    factories.assert_close(factories.whole(lt.load(out)), factories.whole(lt.load(flux.path)))


def test_the_layout_stays_without_to(flux, out):
    assert run(flux.path, "-o", out).exit_code == 0
    assert factories.read_safetensors(out)[0].keys() == factories.read_safetensors(flux.path)[0].keys()


def test_what_a_layout_cannot_hold_is_refused_in_four_parts(sd15, out):
    result = run(sd15.path, "--to", "diffusers", "-o", out)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {sd15.path}: the diffusers layout cannot hold 1 of the input's")
    assert "it has no place for tensors that belong to no module" in result.stderr
    assert "(bundle_emb.style.string_to_param.*)" in result.stderr
    assert "--drop extras" in result.stderr
    assert not os.listdir(out.parent)


def test_what_is_dropped_is_asked_for_and_listed(flux, out):
    arguments = (flux.path, "--to", "musubi", "-o", out)
    assert "--drop text_encoder" in run(*arguments).stderr
    result = run(*arguments, "--drop", "text_encoder")
    assert result.exit_code == 0, result.stderr
    assert "3 tensors (text_encoder): lora_te1_" in words(result.stdout)
    found = json.loads(run(*arguments, "--drop", "text_encoder", "--overwrite", "--json").stdout)
    assert found["dropped"] == [key for key in flux.tensors if key.startswith("lora_te1_")]
    assert set(lt.load(out).components()) == {"denoiser"}


def test_several_things_are_dropped(folder, out):
    made = factories.peft(
        folder / "peft", lora_bias=True, extra={"base_model.model.lm_head.weight": torch.ones(2, 2)}
    )
    arguments = (made.path, "--to", "loralib", "-o", out)
    refused = run(*arguments, "--drop", "bias")
    assert refused.exit_code == 1
    assert "lm_head.weight" in refused.stderr
    result = run(*arguments, "--drop", "bias", "--drop", "extras", "--json")
    assert result.exit_code == 0, result.stderr
    dropped = json.loads(result.stdout)["dropped"]
    assert sorted(dropped) == sorted(key for key in made.tensors if key.endswith(("bias", "lm_head.weight")))


def test_another_kind_is_turned_into_lora(lokr, out):
    exact = run(lokr.path, "--to", "kohya", "--as", "lora", "-o", out, "--json")
    assert exact.exit_code == 0, exact.stderr
    found = json.loads(exact.stdout)
    assert found["kinds"] == {"lora": 12}
    assert all(each["exact"] and each["kind"] == "lokr" for each in found["conversions"])
    expected = factories.deltas_of(lt.load(lokr.path))
    factories.assert_close(factories.deltas_of(lt.load(out)), expected)
    cut = run(lokr.path, "--to", "kohya", "--as", "lora", "--rank", "2", "-o", out, "--overwrite")
    assert cut.exit_code == 0, cut.stderr
    assert {module.rank for module in lt.load(out).modules.values()} == {2}
    assert "largest error" in cut.stdout
    assert "48 turned into LoRA" in cut.stdout


def test_verification_can_be_left_out(flux, out):
    result = run(flux.path, "--to", "comfy", "-o", out, "--no-verify")
    assert "no (--no-verify)" in result.stdout
    found = json.loads(
        run(flux.path, "--to", "comfy", "-o", out, "--no-verify", "--overwrite", "--json").stdout
    )
    assert found["verified"] is None


def test_folding_on_request_leaves_a_scale_of_one(flux, out):
    assert run(flux.path, "--to", "comfy", "-o", out).exit_code == 0
    assert {module.scale for module in lt.load(out).modules.values()} == {0.75}
    assert run(flux.path, "--to", "comfy", "-o", out, "--fold", "--overwrite").exit_code == 0
    folded = lt.load(out)
    assert {module.scale for module in folded.modules.values()} == {1.0}
    factories.assert_close(factories.whole(folded), factories.whole(lt.load(flux.path)))


def test_the_store_dtype_is_chosen(flux, out):
    result = run(flux.path, "--to", "comfy", "--dtype", "bfloat16", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["dtypes"]["BF16"] == 18
    assert 0 < found["verified"]["error"] < 0.03


def test_peft_is_a_folder(folder, out):
    made = factories.diffusers(folder / "unet.safetensors", "sd15", only=["unet."])
    wrong = run(made.path, "--to", "peft", "-o", out)
    assert wrong.exit_code == 1
    assert "folder" in wrong.stderr
    target = out.with_suffix("")
    result = run(made.path, "--to", "peft", "-o", target)
    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(target)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert run(made.path, "--to", "peft", "-o", target).exit_code == 1
    assert run(target, "--to", "diffusers", "-o", out).exit_code == 0
    factories.assert_close(factories.deltas_of(lt.load(out)), made.deltas)


def test_a_list_of_matrices_is_written_as_a_pickle(tmp_path):
    projections = [
        f"text_model.encoder.layers.{layer}.self_attn.{name}_proj"
        for layer in range(12)
        for name in ("q", "k", "v", "out")
    ]
    tensors = {}
    for path in projections:
        tensors[f"text_encoder.{path}.lora_B.weight"] = torch.randn(768, 2)
        tensors[f"text_encoder.{path}.lora_A.weight"] = torch.randn(2, 768)
    source, made = tmp_path / "clip.safetensors", tmp_path / "clip.pt"
    factories.write_safetensors(source, tensors, {})
    result = run(source, "--to", "cloneofsimo", "--arch", "sd15", "-o", made)
    assert result.exit_code == 0, result.stderr
    listed = torch.load(made, weights_only=True)
    assert isinstance(listed, list)
    assert len(listed) == 96
    back = tmp_path / "back.safetensors"
    assert run(made, "--to", "diffusers", "-o", back).exit_code == 0
    written, _ = factories.read_safetensors(back)
    assert {key: written[key][2] for key in tensors} == {
        key: tensor.numpy().tobytes() for key, tensor in tensors.items()
    }
    # Another layout has no such form.
    assert run(source, "--to", "kohya", "--arch", "sd15", "-o", tmp_path / "x.pt").exit_code == 1


def test_a_base_gives_flattened_names_their_dots(tmp_path):
    path = "tower.stage_a.0.gate"
    flat = "lora_unet_" + path.replace(".", "_")
    source, base, made = (tmp_path / name for name in ("flat.safetensors", "base.safetensors", "made"))
    factors = {f"{flat}.lora_down.weight": torch.ones(2, 6), f"{flat}.lora_up.weight": torch.ones(8, 2)}
    factories.write_safetensors(source, factors, {})
    factories.write_safetensors(base, {f"{path}.weight": torch.ones(8, 6)}, {})
    refused = run(source, "--to", "peft", "-o", made)
    assert refused.exit_code == 1
    assert "--base" in refused.stderr
    result = run(source, "--to", "peft", "-o", made, "--base", base)
    assert result.exit_code == 0, result.stderr
    written, _ = factories.read_safetensors(made / "adapter_model.safetensors")
    assert sorted(written) == [f"base_model.model.{path}.lora_{end}.weight" for end in "AB"]
    missing = run(source, "--to", "peft", "-o", tmp_path / "x", "--base", tmp_path / "nowhere")
    assert missing.exit_code == 1
    assert "nowhere" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--output'"),
        (("-o", "x", "--to", "koyha"), "Did you mean kohya?"),
        (("-o", "x", "--arch", "sdlx"), "Did you mean sdxl?"),
        (("-o", "x", "--as", "loha"), "'--as'"),
        (("-o", "x", "--rank", "4"), "Add --as lora."),
        (("-o", "x", "--as", "lora", "--rank", "0"), "'--rank'"),
        (("-o", "x", "--dtype", "int8"), "'--dtype'"),
        (("-o", "x", "--dtype", "fp16"), "Did you mean float16?"),
        (("-o", "x", "--dtype", "half"), "Did you mean float16?"),
        (("-o", "x", "--dtype", "BF16"), "Did you mean bfloat16?"),
        (("-o", "x", "--arch", "SD1.5"), "Did you mean sd15?"),
        (("-o", "x", "--to", "Kohya"), "Did you mean kohya?"),
        (("-o", "x", "--device", "tpu"), "'tpu' is no device"),
        (("-o", "x", "--drop", "magnitud"), "Did you mean: magnitude"),
        (("-o", "x", "--drop", "extras", "--drop", "text_encodr"), "Did you mean: text_encoder"),
        (("-o", "x", "--verfy"), "No such option"),
    ],
)
def test_wrong_usage_is_exit_status_2(flux, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(flux.path, *arguments)
    assert result.exit_code == 2
    assert message in words(result.stderr)
    assert result.stdout == ""
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.safetensors", None, "missing.safetensors"),
        ("text.safetensors", b"hello " * 20, "plain text"),
        ("empty.safetensors", b"", "empty"),
    ],
)
def test_what_cannot_be_read_is_exit_status_1(name, content, message, tmp_path, out):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    result = run(source, "--to", "kohya", "-o", out)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("arguments", [(), ("--overwrite",), ("--dry-run",)])
@pytest.mark.parametrize("name", ["new/", "./", "/", "empty"])
def test_a_folder_s_name_is_refused_where_the_layout_is_a_file(flux, name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = run(flux.path, "--to", "diffusers", "-o", name, *arguments)
    assert result.exit_code == 1
    assert "folder" in result.stderr
    assert "a file's name" in result.stderr.lower()
    assert os.listdir(tmp_path) == ["empty"]


def test_a_folder_with_files_is_called_one(flux, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = run(flux.path, "--to", "peft", "-o", tmp_path)
    assert result.exit_code == 1
    assert "the output is a folder and holds files" in result.stderr
    assert "--overwrite" in result.stderr


def test_a_trailing_slash_is_welcome_where_the_layout_is_a_folder(folder, tmp_path):
    source = factories.diffusers(folder / "slash.safetensors", "sd15", only=["unet."]).path
    result = run(source, "--to", "peft", "-o", f"{tmp_path}/new/")
    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "new")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_weights_of_the_overwritten_folder_do_not_stay_beside_the_new(folder, tmp_path):
    source = factories.diffusers(folder / "stale.safetensors", "sd15", only=["unet."]).path
    for name in ("adapter_model.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(PRECIOUS)
    result = run(source, "--to", "peft", "-o", tmp_path, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
    ]


def test_an_output_in_no_folder_is_refused_before_any_work(flux, tmp_path):
    result = run(flux.path, "--to", "comfy", "-o", tmp_path / "nowhere" / "x.safetensors")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr


def test_a_layout_for_other_models_names_those_that_can_hold_it(flux, tmp_path):
    result = run(flux.path, "--to", "mlx", "-o", tmp_path / "folder")
    assert result.exit_code == 1
    assert "kohya" in result.stderr
    assert "--to" in result.stderr


def test_progress_is_for_terminals_alone(flux, out, monkeypatch):
    assert run(flux.path, "--to", "comfy", "-o", out).stderr == ""

    class Terminal:
        def isatty(self):
            return True

        def __getattr__(self, name):
            return getattr(sys.__stderr__, name)

    monkeypatch.setattr(sys, "stderr", Terminal())
    with output.progress("converting") as progress:
        assert progress is not None
    with output.progress("converting", quiet=True) as progress:
        assert progress is None


def test_progress_counts_the_tensors(flux, out):
    from loratools.ops import convert

    told = []
    convert.convert_file(flux.path, out, to="diffusers", progress=lambda *each: told.append(each))
    written, _ = factories.read_safetensors(out)
    assert [done for _, done, _ in told] == list(range(1, len(written) + 1))
    assert {total for _, _, total in told} == {len(written)}


def test_debug_shows_the_traceback(flux, out):
    out.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "convert", flux.path, "--to", "comfy", "-o", out, "--debug"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "OutputExistsError" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_an_interrupt_leaves_no_output(flux, out):
    # The process interrupts itself between writing and checking, so that the moment is the same on every machine.
    code = (
        # A run in the background may have been told to ignore interrupts.
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from loratools.ops import files\nfrom loratools.cli import main\n"
        "write, check = files.write, lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "files.write = lambda *a, **k: write(*a, **{**k, 'check': check})\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", flux.path, "--to", "comfy", "-o", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted"
    assert not os.listdir(out.parent)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_report_fits_the_terminal(width, lokr, out, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run(lokr.path, "--to", "kohya", "--as", "lora", "--rank", "2", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= width
    assert re.search(r"largest error \d+\.\d%", words(result.stdout))
