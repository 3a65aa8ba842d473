"""The document that ``merge`` writes with --json: every field of its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.report.data import components_json, strict

if TYPE_CHECKING:
    from loratools.ops.merge_results import MergeReport


def merge_json(report: MergeReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``merge --json``.

    ``energy`` is the fraction of Σσ² of the method's full-rank result that was kept, ``error`` the relative error of ΔW
    that this makes, by component and over all.

    Args:
        report: What the merge did.
        dry_run: Whether nothing was written; ``bytes`` is then what would have been.
    """
    found: dict[str, Any] = strict(
        {
            **report._asdict(),
            "dry_run": dry_run,
            "error": report.error,
            "components": components_json(report.components()),
            "modules": [module._asdict() for module in report.modules],
            "estimate": None if report.estimate is None else report.estimate._asdict(),
        }
    )
    return found
