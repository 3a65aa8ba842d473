import math
import re
import shlex

import click
import factories as make
import pytest
import torch

import loratools as lt
from loratools.cli import cli
from loratools.errors import OptionError
from loratools.ops import _doctor_values
from loratools.ops._doctor_fields import LORA_FIELDS
from loratools.ops.doctor_results import CODES, ERROR, INFO, WARNING
from loratools.tensors import from_torch
from tests.ops.doctoring import FAULTS, KEY, base, edited, rewritten

# What never makes it work otherwise, and what always does.
ERRORS = {
    *("unreadable", "not-an-adapter", "incomplete-pairs", "shapes", "empty-tensors", "prefix-doubled"),
    *("prefix-missing", "prefix-wrapped", "adapter-name", "malformed-keys", "rank-contradicts"),
    *("targets-contradict", "method-contradicts", "dora-contradicts", "whole-missing", "pattern-invalid"),
    "nonfinite-scale",
    *("dora-mixed", "nonfinite", "untrained", "base-unreadable", "not-in-base", "shape-differs"),
    *(
        "vocabulary",
        "layout",
        "file-name",
        "kind",
        "family",
        "rank-limit",
        "partner-missing",
        "layers-missing",
    ),
    *("refused", "ignored"),
}
INFOS = {"base-layer", "metadata-contradicts", "note"}


def codes(report):
    return [finding.code for finding in report.findings]


def found(report, code, feature=""):
    (finding,) = [
        each for each in report.findings if each.code == code and (not feature or each.feature == feature)
    ]
    return finding


def parsed(command):
    """The command as click takes it apart, callbacks included; nothing is run."""
    program, name, *arguments = shlex.split(command)
    assert program == "loratools"
    # Commands remember the help option of the first context that they see: it has to be the program's.
    context = click.Context(cli, **cli.context_settings)
    known = cli.get_command(context, name)
    assert known is not None
    known.make_context(name, arguments, parent=context)


def test_every_code_has_a_case():
    assert set(FAULTS) == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_fault_is_found_told_and_mended_by_a_command_that_there_is(code, tmp_path):
    path, options = FAULTS[code](tmp_path / "adapter")
    report = lt.doctor(path, **options)
    assert code in codes(report), report.findings
    severity = ERROR if code in ERRORS else INFO if code in INFOS else WARNING
    assert severity in {each.severity for each in report.findings if each.code == code}
    assert report.ok is (severity != ERROR)
    for finding in report.findings:
        assert finding.code in CODES
        assert finding.what
        assert finding.why
        if finding.command:
            parsed(finding.command)
        assert finding.command or finding.mend or finding.severity != ERROR


@pytest.mark.parametrize(
    "healthy",
    [
        lambda folder: make.peft(folder),
        lambda folder: make.peft(folder, embedding=True),
        lambda folder: make.peft(folder, dora=True),
        lambda folder: make.peft(folder, ranks={make.LLAMA[0][0]: 2}, alphas={make.LLAMA[0][0]: 3.0}),
        lambda folder: make.peft(folder, config={"target_modules": r".*\.(q_proj|v_proj|down_proj)"}),
        lambda folder: make.peft(folder, kind="adalora"),
        lambda folder: make.peft(folder, container="bin", dtype=torch.bfloat16),
        lambda folder: make.mlx(folder),
        lambda folder: make.kohya(folder / "x.safetensors", "sd15", mid=True),
        lambda folder: make.kohya(folder / "x.safetensors", "sdxl", kind="loha", dtype=torch.float16),
        lambda folder: make.kohya(folder / "x.safetensors", "sd15", dora="out"),
        lambda folder: make.diffusers(folder / "x.safetensors", "flux"),
    ],
)
def test_a_healthy_adapter_has_nothing_but_notes(healthy, tmp_path):
    report = lt.doctor(healthy(tmp_path / "adapter").path)
    assert report.ok
    assert set(codes(report)) <= {"note"}


def test_a_base_that_fits_is_silent(tmp_path):
    made = make.peft(tmp_path / "adapter", embedding=True)
    assert codes(lt.doctor(made.path, base=base(tmp_path))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_measured_in_every_dtype(dtype):
    values = torch.tensor([[1.0, -3.0], [0.5, 2.0]], dtype=dtype)
    assert _doctor_values.measure(from_torch("a", values)) == (True, 3.0)
    values[0, 1] = math.nan
    assert _doctor_values.measure(from_torch("a", values)) == (False, 2.0)
    assert _doctor_values.measure(from_torch("a", values).flipped()) == (False, 2.0)
    assert _doctor_values.measure(from_torch("a", torch.full_like(values, math.inf))) == (False, 0.0)


def test_values_are_measured_in_blocks(monkeypatch):
    monkeypatch.setattr(_doctor_values, "_BLOCK", 3)
    values = torch.arange(10.0)
    assert _doctor_values.measure(from_torch("a", values)) == (True, 9.0)
    values[8] = -math.inf
    assert _doctor_values.measure(from_torch("a", values)) == (False, 9.0)


def test_headers_alone_find_no_values(tmp_path):
    path, _ = FAULTS["nonfinite"](tmp_path / "adapter")
    assert lt.doctor(path, values=False).ok


@pytest.mark.parametrize(
    ("runtime", "feature", "options", "severity"),
    [
        ("vllm", "bias", {"config": {"bias": "all"}}, "refused"),
        ("vllm", "tokens", {"config": {"trainable_token_indices": [1]}}, "refused"),
        ("vllm", "lora_bias", {"lora_bias": True}, "refused"),
        ("vllm", "alora", {"config": {"alora_invocation_tokens": [1, 2]}}, "refused"),
        ("vllm", "layer_replication", {"config": {"layer_replication": [[0, 1], [0, 2]]}}, "ignored"),
        ("vllm", "mutated_base", {"config": {"init_lora_weights": "olora"}}, "ignored"),
        ("vllm", "variant", {"config": {"use_qalora": True}}, "ignored"),
        ("vllm", "wrapped", {"form": "fsdp"}, "ignored"),
        ("sglang", "rslora", {"config": {"use_rslora": True}}, "ignored"),
        ("sglang", "ranks", {"ranks": {make.LLAMA[0][0]: 2}, "alphas": {make.LLAMA[0][0]: 4.0}}, "ignored"),
        ("sglang", "regex_targets", {"config": {"target_modules": r".*_proj"}}, "refused"),
        ("lorax", "layer_ranks", {"ranks": {make.LLAMA[0][0]: 2}}, "refused"),
        ("lorax", "embedding", {"embedding": True}, "ignored"),
        ("lorax", "wrapped", {"form": "no_prefix"}, "ignored"),
    ],
)
def test_features_are_named_where_they_are_not_held(runtime, feature, options, severity, tmp_path):
    made = make.peft(tmp_path / "adapter", **options)
    finding = found(lt.doctor(made.path, runtime=runtime), severity, feature)
    assert finding.severity == ERROR
    assert finding.keys
    if finding.command:
        parsed(finding.command)
    assert not [
        each for each in lt.doctor(_plain(tmp_path), runtime=runtime).findings if each.feature == feature
    ]


def _plain(tmp_path):
    return make.peft(tmp_path / "plain").path


def test_what_is_announced_without_a_tensor_and_passed_over_is_only_a_warning(tmp_path):
    made = make.peft(tmp_path / "adapter", config={"bias": "lora_only"})
    assert found(lt.doctor(made.path, runtime="sglang"), "ignored", "bias").severity == WARNING
    assert found(lt.doctor(made.path, runtime="vllm"), "refused", "bias").severity == ERROR


def test_rslora_is_not_told_twice(tmp_path):
    made = make.peft(tmp_path / "adapter", config={"use_rslora": True})
    features = [each.feature for each in lt.doctor(made.path, runtime="sglang").findings if each.feature]
    assert features == ["rslora"]
    assert lt.doctor(made.path, runtime="vllm").ok


def test_scales_that_are_all_the_same_are_held_whatever_patterns_say(tmp_path):
    path = make.LLAMA[0][0]
    made = make.peft(tmp_path / "adapter", rank=4, alpha=8.0, ranks={path: 2}, alphas={path: 4.0})
    assert lt.doctor(made.path, runtime="vllm").ok


def test_a_rank_that_the_program_can_be_started_with_is_a_warning(tmp_path):
    made = make.peft(tmp_path / "adapter", rank=48)
    finding = found(lt.doctor(made.path, runtime="vllm"), "rank-limit")
    assert finding.severity == WARNING
    assert "--max-lora-rank 64" in finding.mend
    assert shlex.split(finding.command)[-1] == "16"
    assert lt.doctor(made.path, runtime="vllm", max_rank=48).ok
    assert not lt.doctor(made.path, runtime="vllm", max_rank=32).ok


def test_layers_are_counted_in_the_base_where_there_is_one(tmp_path):
    model = tuple(row for row in make.LLAMA if row[0].endswith(("q_proj", "v_proj")))
    made = make.peft(tmp_path / "adapter", model)
    assert lt.doctor(made.path, runtime="lorax").ok
    assert lt.doctor(made.path, runtime="lorax", base=base(tmp_path)).ok
    first = tuple(row for row in model if ".0." in row[0])
    part = make.peft(tmp_path / "part", first)
    assert lt.doctor(part.path, runtime="lorax").ok
    finding = found(lt.doctor(part.path, runtime="lorax", base=base(tmp_path)), "layers-missing")
    assert "1 of 2" in finding.what


def test_partners_that_are_there_are_no_fault(tmp_path):
    assert lt.doctor(_plain(tmp_path), runtime="sglang").ok


def test_some_of_several_saved_modules_are_enough(tmp_path):
    extra = {"base_model.model.classifier.weight": torch.ones(2, 16)}
    made = make.peft(tmp_path / "adapter", extra=extra, config={"modules_to_save": ["classifier", "score"]})
    report = lt.doctor(made.path)
    assert report.ok
    assert found(report, "whole-missing").severity == INFO


def test_saved_embeddings_are_compared_with_the_bases_vocabulary(tmp_path):
    fields = {"modules_to_save": ["lm_head"]}
    for rows, expected in ((20, []), (22, ["vocabulary"])):
        extra = {"base_model.model.lm_head.weight": torch.ones(rows, 16)}
        made = make.peft(tmp_path / str(rows), extra=extra, config=fields)
        assert codes(lt.doctor(made.path, base=base(tmp_path))) == expected


def test_modules_that_the_base_has_otherwise_are_told_with_near_misses(tmp_path):
    finding = found(
        lt.doctor(
            make.peft(tmp_path / "a", (("model.layers.0.self_attn.qq_proj", (16, 16)),)).path,
            base=base(tmp_path),
        ),
        "not-in-base",
    )
    assert "model.layers.0.self_attn.q_proj" in finding.what


def test_a_magnitude_may_be_what_a_zero_module_has(tmp_path):
    made = make.peft(tmp_path / "adapter", dora=True)
    zero = {key: torch.zeros_like(each) for key, each in made.tensors.items() if "lora_B" in key}
    assert "untrained" not in codes(lt.doctor(rewritten(made, zero)))


def test_a_configuration_of_another_kind_of_file_is_left_alone(tmp_path):
    made = make.mlx(tmp_path / "adapter")
    assert codes(lt.doctor(edited(made.path, extra_field=1))) == []


def test_comfyui_and_diffusers_differ_in_how_magnitudes_are_called(tmp_path):
    kohya = make.kohya(tmp_path / "a.safetensors", "sd15", dora="out")
    assert lt.doctor(kohya.path, runtime="comfyui").ok
    assert found(lt.doctor(kohya.path, runtime="diffusers"), "ignored").feature == "dora_scale"
    peft = lt.load(kohya.path)
    lt.save(peft, tmp_path / "b.safetensors", layout="diffusers")
    assert found(lt.doctor(tmp_path / "b.safetensors", runtime="comfyui"), "ignored", "dora_vector").command


def test_a_container_that_the_program_does_not_open_is_an_error(tmp_path):
    import numpy

    made = make.mlx(tmp_path / "adapter")
    assert lt.doctor(made.path, runtime="mlx").ok
    numpy.savez(made.path / "adapters.npz", **{key: tensor.numpy() for key, tensor in made.tensors.items()})
    made.file.unlink()
    assert "npz" in found(lt.doctor(made.path, runtime="mlx"), "layout").what


def test_an_unknown_program_is_refused(tmp_path):
    with pytest.raises(OptionError, match="Known: "):
        lt.doctor(_plain(tmp_path), runtime="ollama")


@pytest.mark.parametrize(("limit", "runtime"), [(4, None), (0, "vllm"), (-1, "vllm")])
def test_a_limit_that_is_nobodys_or_none_is_refused(limit, runtime, tmp_path):
    with pytest.raises(OptionError, match=f"{limit}"):
        lt.doctor(_plain(tmp_path), runtime=runtime, max_rank=limit)


@pytest.mark.peers
def test_the_fields_are_pefts():
    import dataclasses

    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == LORA_FIELDS


def test_pefts_usual_name_in_the_keys_is_a_fault_for_others(tmp_path):
    made = make.peft(tmp_path / "adapter", form="named")
    assert found(lt.doctor(made.path), "adapter-name").severity == WARNING
    assert lt.doctor(made.path, runtime="peft").ok
    assert found(lt.doctor(made.path, runtime="vllm"), "refused").feature == "default_name"
    assert found(lt.doctor(made.path, runtime="lorax"), "ignored").feature == "default_name"


def test_keys_of_findings_are_all_of_them(tmp_path):
    made = make.peft(tmp_path / "adapter", form="double")
    finding = found(lt.doctor(made.path), "prefix-doubled")
    assert set(finding.keys) == set(made.tensors)
    assert re.match(r"10 of 10 keys \(first: ", finding.what)
    assert KEY not in finding.keys
