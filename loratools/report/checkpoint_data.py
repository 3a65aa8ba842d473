"""The documents that ``bake``, ``extract`` and ``verify`` write with --json: every field of their reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.report.data import strict

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import BakeEstimate, BakeReport, ExtractReport, VerifyReport


def bake_json(report: BakeReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``bake --json``.

    ``kept`` is ⟨stored − W, ΔW⟩ / ‖ΔW‖² and ``error`` ‖stored − (W + ΔW)‖ / ‖ΔW‖, for each of ``tensors`` and over all.

    Args:
        report: What the bake did.
        dry_run: Whether nothing was written; ``bytes`` is then what would have been.
    """
    found: dict[str, Any] = strict(
        {
            **report._asdict(),
            "dry_run": dry_run,
            "tensors": [tensor._asdict() for tensor in report.tensors],
            "estimate": None if report.estimate is None else _bake_estimate(report.estimate),
        }
    )
    return found


def _bake_estimate(estimate: BakeEstimate) -> dict[str, Any]:
    return {
        **estimate.whole._asdict(),
        "copy_rate": estimate.copy_rate,
        "compute_rate": estimate.compute_rate,
    }


def extract_json(report: ExtractReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``extract --json``.

    ``energy`` is the fraction of Σ‖ΔW‖² that was kept, ``error`` sqrt(1 − energy), ``optimum`` a lower bound of it.

    Args:
        report: What the extraction found.
        dry_run: Whether nothing was written; ``bytes`` is then what would have been.
    """
    found: dict[str, Any] = strict(
        {
            **report._asdict(),
            "dry_run": dry_run,
            "ranks": report.ranks,
            "modules": [module._asdict() for module in report.modules],
            "left_out": [each._asdict() for each in report.left_out],
            "estimate": None if report.estimate is None else report.estimate._asdict(),
        }
    )
    return found


def verify_json(report: VerifyReport) -> dict[str, Any]:
    """The document of ``verify --json``; ``ok`` is whether every tensor is what it should be."""
    found: dict[str, Any] = strict(
        {**report._asdict(), "tensors": [tensor._asdict() for tensor in report.tensors]}
    )
    return found
