"""What ``pack --json`` and ``unpack --json`` write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.report.data import strict

if TYPE_CHECKING:
    from loratools.ops.pack_results import PackReport, UnpackReport


def pack_json(report: PackReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``pack --json``: what ``index.json`` says, and what the run did.

    ``for`` and ``shared_basis`` are null without a program and without a shared basis.
    """
    found: dict[str, Any] = strict(
        {
            "output": report.output,
            "dry_run": dry_run,
            "layout": report.layout,
            "for": report.runtime or None,
            "bytes": report.bytes,
            "adapters": [each._asdict() for each in report.adapters],
            "aliases": [each._asdict() for each in report.aliases],
            "unfit": [each._asdict() for each in report.unfit],
            "reused": report.reused,
            "notes": report.notes,
            "shared_basis": [each._asdict() for each in report.shared] or None,
            "estimate": None if report.estimate is None else report.estimate._asdict(),
        }
    )
    return found


def unpack_json(report: UnpackReport, *, dry_run: bool = False) -> dict[str, Any]:
    """The document of ``unpack --json``."""
    found: dict[str, Any] = strict(
        {
            "pack": report.pack,
            "output": report.output,
            "dry_run": dry_run,
            "layout": report.layout,
            "bytes": report.bytes,
            "adapters": [each._asdict() for each in report.adapters],
        }
    )
    return found
