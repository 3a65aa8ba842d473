"""Hand-made results of baking, extracting and verifying for the reports' tests."""

from __future__ import annotations

from loratools.ops.checkpoint_results import (
    BakedTensor,
    BakeReport,
    ExtractedModule,
    ExtractReport,
    LeftOut,
    VerifiedTensor,
    VerifyReport,
)
from loratools.ops.prediction_results import Estimate

KEY = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_out.0.weight"
TARGET = "input_blocks.{}.1.transformer_blocks.0.attn2.to_out.0"
LONG = "models/a rather long name of a checkpoint that somebody trained at night-v2.safetensors"


def estimate(**changes) -> Estimate:
    given = {
        "seconds": 125.0,
        "workers": 4,
        "sequential": 5.0,
        "read": 5_000_000_000,
        "written": 2_500_000_000,
        "memory": 1_500_000_000,
        "peak": 4_000_000_000,
        "bound": 100.0,
        "efficiency": 0.8,
        "tasks": 112,
        "read_rate": 2e9,
        "write_rate": 4e8,
    }
    return Estimate(**{**given, **changes})


def baked_tensor(number: int, **changes) -> BakedTensor:
    given = {
        "key": KEY.format(number),
        "target": TARGET.format(number),
        "component": "denoiser" if number % 3 else "text_encoder",
        "shape": (1280, 1280),
        "dtype": "F16",
        "adapters": (0,),
        "norm": 1.25 + number,
        "kept": 1.0 - 0.01 * number,
        "error": 0.02 * number,
    }
    return BakedTensor(**(given | changes))


def bake_report(**changes) -> BakeReport:
    given = {
        "base": LONG,
        "output": "baked.safetensors",
        "adapters": ("loras/style.safetensors", "loras/character/adapter_model.safetensors"),
        "weights": (0.8, -0.5),
        "arch": "sd15",
        "container": "safetensors",
        "bytes": 2_132_696_762,
        "files": 1,
        "beside": (),
        "tensors": tuple(baked_tensor(number) for number in range(12)),
        "copied": 1118,
        "changed_bytes": 1_234_567_890,
        "matched": (264, 12),
        "missing": ((), tuple(f"{TARGET.format(number)}.lora_down" for number in range(7))),
        "kept": 0.99931,
        "error": 0.0123,
        "seconds": 12.34,
        "notes": ("the embeddings are untied",),
    }
    return BakeReport(**(given | changes))


def extracted_module(number: int, **changes) -> ExtractedModule:
    given = {
        "target": TARGET.format(number),
        "component": "denoiser",
        "kind": "lora",
        "shape": (1280, 1280),
        "rank": 4 + number,
        "norm": 2.0,
        "energy": 1.0 - (0.1 * number) ** 2,
        "error": 0.1 * number,
        "optimum": 0.0999 * number,
        "method": "randomized",
    }
    return ExtractedModule(**(given | changes))


def extract_report(**changes) -> ExtractReport:
    given = {
        "base": LONG,
        "tuned": "tuned.ckpt",
        "output": "tuned-lora-e95.safetensors",
        "arch": "sd15",
        "layout": "kohya",
        "rule": "energy 0.95",
        "bytes": 34_567_890,
        "dtype": "F16",
        "modules": (
            *(extracted_module(number) for number in range(8)),
            extracted_module(9, component="text_encoder", kind="full", rank=None, error=0.0, energy=1.0),
        ),
        "unchanged": 128,
        "left_out": (
            LeftOut("first_stage_model.a", "of no known component", 0.5),
            *(LeftOut(f"b.{number}.bias", "a bias; --full-small takes it along", 3.0) for number in range(9)),
        ),
        "energy": 0.951,
        "error": 0.2213,
        "optimum": 0.2211,
        "device": "cpu",
        "seconds": 75.2,
        "notes": ("the vocabulary is larger",),
    }
    return ExtractReport(**(given | changes))


def verified_tensor(number: int, **changes) -> VerifiedTensor:
    given = {
        "key": KEY.format(number),
        "target": TARGET.format(number),
        "component": "denoiser",
        "verdict": "baked",
        "norm": 2.0,
        "kept": 1.0002,
        "error": 0.01 * number,
        "rounding": 0.01,
        "dtype": "F16",
    }
    return VerifiedTensor(**(given | changes))


def verify_report(**changes) -> VerifyReport:
    given = {
        "base": LONG,
        "baked": "baked.safetensors",
        "adapters": ("loras/style.safetensors",),
        "weights": (1.0,),
        "arch": "sd15",
        "ok": True,
        "tensors": tuple(verified_tensor(number) for number in range(12)),
        "untouched": 1118,
        "kept": 1.0,
        "error": 0.0123,
    }
    return VerifyReport(**(given | changes))


def failed_report(**changes) -> VerifyReport:
    """One tensor of each verdict among good ones."""
    odd = (
        verified_tensor(20, verdict="not baked", kept=0.0, error=1.0),
        verified_tensor(21, verdict="partly", kept=0.5, error=0.5, strength=0.5),
        verified_tensor(22, verdict="wrong", kept=-0.4, error=3.1, component="text_encoder"),
        verified_tensor(23, verdict="absent", kept=None, error=None, rounding=None, dtype=""),
        verified_tensor(
            24, verdict="unexpected", norm=0.0, kept=None, error=None, rounding=None, component=""
        ),
    )
    given = {"ok": False, "tensors": (*verify_report().tensors, *odd), "kept": 0.9}
    return verify_report(**(given | changes))
