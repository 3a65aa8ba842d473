"""Hand-made results for the report's tests."""

from __future__ import annotations

import io

from rich.console import Console

from loratools.ops.merge_results import MergedModule, MergeReport
from loratools.ops.results import (
    ComponentInfo,
    Conversion,
    ConvertReport,
    Info,
    LedgerEntry,
    ModuleInfo,
)
from loratools.report.values import Symbols, symbols_for

TARGET = "input_blocks.{}.1.transformer_blocks.0.attn2.to_out.0"


def rendered(make, width: int, encoding: str = "utf-8") -> str:
    """What a report prints on an output of this width and encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False, color_system=None)
    symbols: Symbols = symbols_for(console.encoding)
    console.print(make(width, symbols))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def module(number: int, **changes) -> ModuleInfo:
    given = {
        "target": TARGET.format(number),
        "component": "denoiser",
        "kind": "lora",
        "shape": (1280, 2048),
        "rank": 4 + number,
        "alpha": 8.0,
        "scale": 0.5,
        "dtype": "F16",
        "norm": 12345.6789,
        "spectral_norm": 0.00001234,
        "stable_rank": 3.25,
        "effective_rank": 5.5,
        "energy": {1: 0.5, 2: 0.75},
    }
    return ModuleInfo(**(given | changes))


def component(**changes) -> ComponentInfo:
    given = {
        "modules": 722,
        "ranks": {4: 100, 8: 500, 16: 60, 32: 62},
        "norm": 12345.6789,
        "spectral_norm": 0.00001234,
        "stable_rank": 3.25,
        "effective_rank": 5.5,
        "energy": {1: 0.31, 2: 0.5, 4: 0.75, 8: 0.9997, 16: 1.0},
    }
    return ComponentInfo(**(given | changes))


def info(**changes) -> Info:
    given = {
        "path": "loras/a rather long name of an adapter that somebody trained at night-v2.safetensors",
        "bytes": 170_543_210,
        "type": "adapter",
        "layout": "kohya",
        "variant": "malformed",
        "container": "safetensors",
        "arch": "sdxl",
        "arch_title": "Stable Diffusion XL",
        "kinds": {"lora": 700, "lokr": 22},
        "components": {"denoiser": component(), "text_encoder_2": component(modules=72, ranks={4: 72})},
        "modules": tuple(module(number) for number in range(30)),
        "tensors": 2166,
        "dtypes": {"F16": 2000, "F32": 166},
        "unclaimed": tuple(f"text_model.embeddings.token_embedding.{number}" for number in range(7)),
        "metadata": {"ss_steps": "1000"},
        "training": {
            "base model": "sd_xl_base_1.0",
            "model hash": "150ef207aad0" * 5,
            "comment": "word " * 100,
            "tags": {f"tag {number}": 99 - number for number in range(20)},
        },
        "warnings": ("the metadata says rank 16 (ss_network_dim), the modules have rank 4, 8, 16, 32",),
    }
    return Info(**(given | changes))


def merge_report(**changes) -> MergeReport:
    given = {
        "method": "ties",
        "options": {"rank": None, "density": 0.3, "lambda": 1.0},
        "inputs": (
            {
                "path": "loras/style.safetensors",
                "weight": 0.8,
                "layout": "kohya",
                "arch": "sdxl",
                "modules": 794,
                "sha256": "ab" * 32,
                "bytes": 23_456_789,
            },
            {
                "path": "loras/character/adapter_model.safetensors",
                "weight": -0.5,
                "layout": "peft",
                "arch": "sdxl",
                "modules": 560,
                "sha256": "",
            },
        ),
        "modules": (
            MergedModule("a", "denoiser", (0, 1), 8, 0.75, before=(16, 4), norm=3.0),
            MergedModule("b", "denoiser", (0,), 4, before=(4,), norm=2.0),
            MergedModule("c", "text_encoder", (0, 1), 16, 0.5, before=(16, 4), norm=1.0),
        ),
        "energy": 0.9997,
        "layout": "kohya",
        "arch": "sdxl",
        "dtypes": {"F16": 9},
        "ranks": {4: 1, 8: 1, 16: 1},
        "carried": ("<token>",),
        "notes": ("alpha is stale",),
        "output": "out.safetensors",
        "bytes": 1_234_567,
    }
    return MergeReport(**(given | changes))


def convert_report(**changes) -> ConvertReport:
    given = {
        "input": "loras/a rather long name of an adapter that somebody trained at night-v2.safetensors",
        "output": "out.safetensors",
        "bytes": 1_234_567,
        "arch": "flux",
        "source": "diffusers (peft-keys)",
        "layout": "kohya",
        "modules": (304, 152),
        "kinds": {"lora": 150, "full": 2},
        "ranks": {0: 2, 16: 100, 48: 50},
        "dtypes": {"F16": 304, "F32": 152},
        "ledger": (
            LedgerEntry("a.lora_A.weight", "fused", ("a.lora_down.weight",)),
            LedgerEntry("a.lora_B.weight", "fused", ("a.lora_up.weight",)),
            LedgerEntry("b.lora_A.weight", "moved", ("b.lora_down.weight",)),
            LedgerEntry("c.diff", "moved", ("c.diff",)),
            LedgerEntry("b.alpha", "folded"),
            *(LedgerEntry(f"[bold]token {number}", "dropped", (), "extras") for number in range(7)),
            LedgerEntry("c.diff_b", "dropped", (), "bias"),
        ),
        "conversions": (
            *(Conversion(TARGET.format(number), "lokr", 16, 0.01 * number, False) for number in range(1, 13)),
            Conversion("small", "loha", 16, 0.0, True),
        ),
        "weights": 152,
        "error": 4.4966e-08,
        "worst": "single_blocks.0.linear1",
        "notes": (
            "alpha is stale",
            *(f"single_blocks.{number}.linear1: 4 of 7 shares have no module" for number in range(38)),
            "double_blocks.0.img_attn.qkv: 1 of 3 shares have no module",
        ),
    }
    return ConvertReport(**(given | changes))
