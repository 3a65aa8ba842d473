"""Every adapter of the reference data, for every program."""

import csv
import json

import loratools as lt

RUNTIMES = ("vllm", "sglang", "llama.cpp", "mlx", "peft", "diffusers", "comfyui", "a1111", "lorax")


def codes(report):
    return [finding.code for finding in report.findings]


# By the inventory's label: the programs in which all files of it work as they are; those that work in none are not
# read by any of them, or are faulty.
WORKS = {
    "diffusers-attnprocs": {"diffusers", "comfyui"},
    "diffusers-lora-updown": {"diffusers", "comfyui"},
    "diffusers-peft-keys": {"diffusers", "comfyui"},
    "diffusers-peft-noprefix": {"diffusers"},
    "kohya-malformed": set(),
    "loralib-like": set(),
    "lycoris-lokr": {"comfyui", "a1111"},
    "mlx-safetensors": {"mlx"},
    "peft-adalora": {"peft"},
    "peft-ia3": {"peft"},
    "peft-lora": {"peft"},
    "peft-lora-pickle": {"peft", "vllm", "sglang", "lorax"},
}
OTHERS = {
    *("adapterhub", "not-adapter", "peft-prefix_tuning", "peft-prompt_tuning", "textual-inversion"),
    "unreadable",
}


def test_the_corpus_has_sensible_verdicts(shared):
    with open(shared / "corpus" / "INVENTORY.tsv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert rows
    for row in rows:
        path = shared / "corpus" / row["path"]
        # Values are the same for all programs, and read once.
        alone = lt.doctor(path)
        asked = {name: lt.doctor(path, runtime=name, values=False) for name in RUNTIMES}
        assert alone.ok or row["layout"] in OTHERS | {"kohya-malformed", "custom-w_a_b"}, row["path"]
        ok = {name for name, report in asked.items() if report.ok}
        if row["layout"] in OTHERS:
            assert not ok
            assert set(codes(alone)) <= {"not-an-adapter", "unreadable"}
        elif row["layout"] == "peft-lora":
            # Whoever copied one of them left it with a name that programs do not look for.
            assert (ok >= WORKS["peft-lora"]) is not ("Copy of" in row["path"]), row["path"]
        else:
            assert ok == WORKS.get(row["layout"], ok), row["path"]


# What the oracle's inputs have that doctor must name, by case and input.
NAMED = {
    ("gguf__llama_dora", "adapter"): ("llama.cpp", "dora"),
    ("gguf__qwen2_bias_all", "adapter"): ("llama.cpp", "bias"),
    ("peft_bake__llama_trainable_tokens", "adapter"): ("vllm", "tokens"),
    ("peft_convert__pissa_to_lora", "trained"): ("vllm", "mutated_base"),
    ("peft_merge__regex_targets", "adapter0"): ("sglang", "regex_targets"),
    ("peft_merge__modules_to_save_one", "adapter0"): ("vllm", "whole"),
    ("peft_merge__lora_bias_cat", "adapter0"): ("vllm", "lora_bias"),
    ("peft_bake__llama_pattern_order", "adapter"): ("vllm", "scales"),
}


def test_the_oracles_inputs_are_looked_at_for_every_program(shared):
    named = set()
    for manifest in sorted((shared / "oracle").glob("*/manifest.json")):
        inputs = json.loads(manifest.read_text("utf-8"))["inputs"]
        for role, value in inputs.items():
            path = manifest.parent / str(value.get("path") if isinstance(value, dict) else value)
            if not path.exists() or not role.startswith(("adapter", "lora", "trained")):
                continue
            assert lt.doctor(path).modules, path
            name, feature = NAMED.get((manifest.parent.name, role), ("vllm", ""))
            report = lt.doctor(path, runtime=name, values=False)
            if feature:
                assert feature in {each.feature for each in report.findings}, path
                named.add((manifest.parent.name, role))
            for each in RUNTIMES:
                assert lt.doctor(path, runtime=each, values=False).runtime == each
    assert named == set(NAMED)
