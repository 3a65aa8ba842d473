"""The commands that doctor shows, run."""

import json
import shlex

import factories as make
import pytest
import torch

import loratools as lt
from loratools.cli import cli
from loratools.errors import ArchitectureError
from loratools.ops.convert import convert_file


def found(report, code):
    (finding,) = [each for each in report.findings if each.code == code]
    return finding


@pytest.mark.parametrize(
    ("runtime", "feature"),
    [("vllm", "scales"), ("sglang", "rslora"), ("sglang", "ranks"), ("lorax", "layer_ranks")],
)
def test_the_command_mends_it(runtime, feature, tmp_path):
    path = make.LLAMA[0][0]
    options = {
        "scales": {"alphas": {path: 16.0}},
        "rslora": {"config": {"use_rslora": True}},
        "ranks": {"ranks": {path: 2}, "alphas": {path: 4.0}},
        "layer_ranks": {"ranks": {path: 2}, "alphas": {path: 4.0}},
    }[feature]
    made = make.peft(tmp_path / "adapter", **options)
    (finding,) = [each for each in lt.doctor(made.path, runtime=runtime).findings if each.feature == feature]
    _, name, *arguments = shlex.split(finding.command)
    assert cli.main([name, *arguments, "--quiet"], prog_name="loratools", standalone_mode=False) in (None, 0)
    output = arguments[arguments.index("-o") + 1]
    assert lt.doctor(output, runtime=runtime).ok
    # Partners that a program needs beside the modules are added as zeros.
    deltas = make.deltas_of(lt.load(output))
    added = {key: deltas.pop(key) for key in deltas.keys() - made.deltas.keys()}
    assert not any(delta.any() for delta in added.values())
    make.assert_close(deltas, made.deltas, make.TOLERANCE["F32"])


def test_an_adapter_for_llama_cpp_is_written_by_the_command(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    make.peft(tmp_path / "adapter", config={"use_rslora": True})
    (tmp_path / "BASE").mkdir()
    heads = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "BASE" / "config.json").write_text(json.dumps(heads), "utf-8")
    _, name, *arguments = shlex.split(found(lt.doctor("adapter", runtime="llama.cpp"), "layout").command)
    cli.main([name, *arguments, "--quiet"], prog_name="loratools", standalone_mode=False)
    assert lt.doctor(arguments[arguments.index("-o") + 1], runtime="llama.cpp").ok


def test_the_command_mends_odd_keys(tmp_path):
    for form in ("named", "no_prefix", "double", "fsdp", "compiled"):
        made = make.peft(tmp_path / form, form=form)
        finding = next(each for each in lt.doctor(made.path).findings if each.command)
        _, name, *arguments = shlex.split(finding.command)
        cli.main([name, *arguments, "--quiet"], prog_name="loratools", standalone_mode=False)
        assert lt.doctor(arguments[arguments.index("-o") + 1], runtime="vllm").ok


def run(command):
    """Run a command that doctor shows; its output."""
    _, name, *arguments = shlex.split(command)
    assert cli.main([name, *arguments, "--quiet"], prog_name="loratools", standalone_mode=False) in (None, 0)
    return arguments[arguments.index("-o") + 1]


def errors(report):
    return [each for each in report.findings if each.severity == "error"]


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax", "mlx"])
def test_one_command_mends_all_that_a_program_does_not_hold(runtime, tmp_path):
    """Another kind, other scales, and a head that was trained whole."""
    head = {"base_model.model.lm_head.weight": torch.ones(20, 16)}
    path = make.LLAMA[0][0]
    made = make.peft(
        tmp_path / "adapter",
        kind="adalora",
        alphas={path: 16.0},
        extra=head,
        config={"modules_to_save": ["lm_head"]},
    )
    report = lt.doctor(made.path, runtime=runtime)
    assert {each.feature for each in errors(report)} >= {"", "whole"}
    (command,) = {each.command for each in errors(report)}
    output = run(command)
    assert lt.doctor(output, runtime=runtime).ok
    arguments = shlex.split(command)
    whole, _ = make.read_safetensors(arguments[arguments.index("--full-weights") + 1])
    assert set(whole) == {"lm_head.weight"}


def test_the_base_is_asked_for_where_the_form_needs_it(tmp_path):
    made = make.peft(tmp_path / "adapter", dora=True)
    report = lt.doctor(made.path, runtime="vllm")
    assert {each.command.endswith(" --base BASE") for each in errors(report)} == {True}
    assert not any("--base" in each.command for each in lt.doctor(made.path, runtime="mlx").findings)


def test_what_no_form_can_hold_is_baked(tmp_path):
    made = make.peft(tmp_path / "adapter", embedding=True)
    (command,) = {each.command for each in errors(lt.doctor(made.path, runtime="lorax"))}
    assert command.startswith("loratools bake BASE ")
    assert not errors(lt.doctor(made.path, runtime="vllm"))


def test_a_vector_without_its_indices_has_no_command_that_would_fail(tmp_path):
    (tmp_path / "adapter").mkdir()
    make.write_safetensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {"base_model.unilora_theta_d": torch.ones(64)},
        {"format": "pt"},
    )
    config = {"peft_type": "UNILORA", "r": 4, "target_modules": ["q_proj"], "theta_d_length": 64}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    for runtime in ("vllm", "llama.cpp", "mlx"):
        found_ones = errors(lt.doctor(tmp_path / "adapter", runtime=runtime))
        assert {each.code for each in found_ones} >= {"kind"}
        assert not any(each.command for each in found_ones)
        assert {"save it again" in each.mend for each in found_ones} == {True}


@pytest.mark.parametrize(
    ("layout", "name"), [("gguf", "adapter-other.gguf"), ("loralib", "adapter.safetensors")]
)
def test_a_configuration_of_another_file_is_not_taken_for_its_own(layout, name, tmp_path):
    pytest.importorskip("gguf")
    made = make.peft(tmp_path / "adapter", alpha=8.0)
    heads = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    base = tmp_path / "config.json"
    base.write_text(json.dumps(heads), "utf-8")
    output = made.path / name
    output.parent.joinpath("adapter_model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((made.path / "adapter_config.json").read_bytes())
    source = tmp_path / "adapter_model.safetensors"
    run(
        shlex.join(
            ["loratools", "convert", f"{source}", "-o", f"{output}", "--to", layout, "--base", f"{base}"]
        )
    )
    assert lt.load(output).config == {}
    # llama.cpp has the rows of queries and keys in another order.
    plain = [key for key in made.deltas if not key.endswith(("q_proj", "k_proj"))]
    deltas = make.deltas_of(lt.load(output))
    make.assert_close({key: deltas[key] for key in plain}, {key: made.deltas[key] for key in plain}, 1e-6)


def of_experts(folder):
    """A PEFT folder with a module for each of two experts."""
    tensors = {}
    for expert in range(2):
        for name, out, into in (("gate_proj", 6, 4), ("up_proj", 6, 4), ("down_proj", 4, 6)):
            stem = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.ones(2, into) + expert
            tensors[f"{stem}.lora_B.weight"] = torch.ones(out, 2) + expert
    make.write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_experts_are_stacked_where_a_program_has_them_so(tmp_path):
    path = of_experts(tmp_path)
    (command,) = {each.command for each in errors(lt.doctor(path, runtime="mlx"))}
    assert command.startswith("loratools convert ")
    assert lt.doctor(run(command), runtime="mlx").ok
    (baked,) = {each.command for each in errors(lt.doctor(path, runtime="lorax"))}
    assert baked.startswith("loratools bake BASE ")


def test_a_convolutions_scales_are_baked_where_a_program_has_no_such_layer(tmp_path):
    tensors = {"base_model.model.conv2d.ia3_l": torch.ones(1, 5, 1, 1)}
    make.write_safetensors(tmp_path / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "IA3", "target_modules": ["conv2d"], "feedforward_modules": ["conv2d"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    for runtime in ("vllm", "mlx", "llama.cpp"):
        found_ones = errors(lt.doctor(tmp_path, runtime=runtime))
        assert "conv" in {each.feature for each in found_ones}
        (command,) = {each.command for each in found_ones}
        assert command.startswith("loratools bake BASE ")


def test_a_model_of_another_kind_is_refused_with_layouts_of_programs_that_run_such(tmp_path):
    vit = tuple((f"vit.encoder.layer.{number}.attention.attention.query", (8, 8)) for number in range(2))
    made = make.peft(tmp_path / "vit", vit)
    with pytest.raises(ArchitectureError, match=r"for a vision model.* with --to: peft\.?$"):
        convert_file(made.path, tmp_path / "out", to="vllm")
    image = make.kohya(tmp_path / "x.safetensors", "sd15")
    with pytest.raises(ArchitectureError, match=r"--to: .*comfy, diffusers, kohya") as refused:
        convert_file(image.path, tmp_path / "out", to="vllm")
    assert "gguf" not in str(refused.value)
