"""Results as JSON values: what ``--json`` writes. NaN and Infinity, which JSON lacks, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.ops.results import ComponentInfo, ConvertReport, Info, ModuleInfo

if TYPE_CHECKING:
    from loratools.ops.merge_results import MergedGroup
    from loratools.ops.resize_results import ResizedGroup


def dumps(value: Any) -> str:
    """Strict JSON in printable ASCII, which survives any terminal, pipe and code page."""
    # The one control character that JSON lets stand, and only ever within a string.
    return json.dumps(strict(value), indent=2, allow_nan=False).replace("\x7f", "\\u007f")


def strict(value: Any) -> Any:
    """The value with what JSON cannot hold replaced: NaN and Infinity by null, the rest by its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [strict(each) for each in value]
    return str(value)


def info_json(info: Info) -> dict[str, Any]:
    """One file's entry of ``info --json``.

    ``norm`` is the Frobenius norm of ΔW with its scale; ``energy`` is the fraction of Σσ² kept at smaller
    ranks, by rank. Both are null where they were not asked for or cannot be known.
    """
    found: dict[str, Any] = strict(
        {
            "path": info.path,
            "bytes": info.bytes,
            "type": info.type,
            "layout": info.layout,
            "variant": info.variant,
            "container": info.container,
            "arch": info.arch,
            "arch_title": info.arch_title,
            "family": info.family,
            "kinds": info.kinds,
            "components": {name: _component(each) for name, each in info.components.items()},
            "modules": [_module(each) for each in info.modules],
            "tensors": info.tensors,
            "dtypes": info.dtypes,
            "unclaimed": info.unclaimed,
            "metadata": info.metadata,
            "training": info.training,
            "warnings": info.warnings,
            "error": info.error,
        }
    )
    return found


def convert_json(report: ConvertReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``convert --json``.

    ``ledger`` has an entry for every tensor of the input: its key, its fate, and the output's keys that it went into.

    Args:
        report: What the conversion did.
        dry_run: Whether nothing was written; ``bytes`` is then what would have been.
    """
    found: dict[str, Any] = strict(
        {
            "input": report.input,
            "output": report.output,
            "bytes": report.bytes,
            "dry_run": dry_run,
            "arch": report.arch,
            "from": report.source,
            "layout": report.layout,
            "modules": {"input": report.modules[0], "output": report.modules[1]},
            "kinds": report.kinds,
            "ranks": report.ranks,
            "dtypes": report.dtypes,
            "fates": report.fates,
            "ledger": [entry._asdict() for entry in report.ledger],
            "tensors": [tensor._asdict() for tensor in report.tensors],
            "conversions": [each._asdict() for each in report.conversions],
            "verified": None
            if report.weights is None
            else {"weights": report.weights, "error": report.error, "worst": report.worst},
            "dropped": report.dropped,
            "runtime": report.runtime or None,
            "normalised": [each._asdict() for each in report.normalised],
            "full_weights": report.full_weights or None,
            "notes": report.notes,
        }
    )
    return found


def _component(component: ComponentInfo) -> dict[str, Any]:
    return {
        "modules": component.modules,
        "ranks": component.ranks,
        "norm": component.norm,
        "spectral_norm": component.spectral_norm,
        "stable_rank": component.stable_rank,
        "effective_rank": component.effective_rank,
        "energy": component.energy,
    }


def _module(module: ModuleInfo) -> dict[str, Any]:
    return {
        "target": module.target,
        "component": module.component,
        "kind": module.kind,
        "op": module.op,
        "shape": module.shape,
        "rank": module.rank,
        "experts": module.experts,
        "alpha": module.alpha,
        "scale": module.scale,
        "norm": module.norm,
        "spectral_norm": module.spectral_norm,
        "stable_rank": module.stable_rank,
        "effective_rank": module.effective_rank,
        "energy": module.energy,
        "dtype": module.dtype,
        "dora": module.dora,
        "magnitude_axis": module.magnitude_axis,
    }


def components_json(groups: Mapping[str, MergedGroup | ResizedGroup]) -> dict[str, Any]:
    """By component, the ranks of its modules before and after, and what was kept of them."""
    return {
        name: {
            "modules": len(own.modules),
            "rank_before": [each.before for each in own.modules],
            "rank": [each.rank for each in own.modules],
            "energy": own.energy,
            "error": own.error,
        }
        for name, own in groups.items()
    }
