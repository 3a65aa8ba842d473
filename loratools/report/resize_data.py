"""The document that ``resize`` writes with --json: every field of its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.report.data import components_json, strict

if TYPE_CHECKING:
    from loratools.ops.resize_results import ResizeReport


def resize_json(report: ResizeReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``resize --json``.

    ``energy`` is the fraction of Σσ² that was kept, ``error`` ‖ΔW − ΔW'‖_F / ‖ΔW‖_F with the store dtype's rounding,
    for each of ``modules``, by component and over all. ``curves`` has by component the fraction of Σσ² that is kept if
    every module is cut to a rank, by rank.

    Args:
        report: What the resize did.
        dry_run: Whether nothing was written; ``bytes`` is then what would have been.
    """
    found: dict[str, Any] = strict(
        {
            **report._asdict(),
            "dry_run": dry_run,
            "energy": report.energy,
            "error": report.error,
            "components": components_json(report.components()),
            "modules": [module._asdict() for module in report.modules],
            "estimate": None if report.estimate is None else report.estimate._asdict(),
        }
    )
    return found
