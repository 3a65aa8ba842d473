"""What ``doctor --json`` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.report.data import strict

if TYPE_CHECKING:
    from loratools.ops.doctor_results import DoctorReport


def doctor_json(report: DoctorReport) -> dict[str, Any]:
    """The document of ``doctor --json``.

    ``ok`` is what the exit status says. A finding's ``code`` is stable; ``command`` and ``feature`` are null where
    there is none.
    """
    found: dict[str, Any] = strict(
        {
            "path": report.path,
            "ok": report.ok,
            "layout": report.layout,
            "arch": report.arch,
            "for": report.runtime or None,
            "base": report.base or None,
            "modules": report.modules,
            "counts": report.counts,
            "findings": [
                {**each._asdict(), "command": each.command or None, "feature": each.feature or None}
                for each in report.findings
            ],
        }
    )
    return found
