"""The document that ``compare`` writes with --json: every field of its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.report.data import strict

if TYPE_CHECKING:
    from loratools.ops.compare_results import ComparedPair, CompareReport, Relation


def compare_json(report: CompareReport) -> dict[str, Any]:
    """The document of ``compare --json``.

    ``adapters`` are numbered from 0 in the order given, as ``first``, ``second`` and ``same`` have them; ``cosines``
    and ``distances`` have a row and a column for each. A figure is null where one of two changes is zero, or where it
    was not computed.

    Args:
        report: What the comparison found.
    """
    found: dict[str, Any] = strict(
        {
            **report._asdict(),
            "adapters": [adapter._asdict() for adapter in report.adapters],
            "pairs": [_pair(pair) for pair in report.pairs],
            "suggestion": None if report.suggestion is None else report.suggestion._asdict(),
        }
    )
    return found


def _pair(pair: ComparedPair) -> dict[str, Any]:
    return {
        **_flat(pair._asdict(), pair.relation),
        "components": {name: relation._asdict() for name, relation in pair.components.items()},
        "modules": [_flat(module._asdict(), module.relation) for module in pair.modules],
    }


def _flat(fields: dict[str, Any], relation: Relation) -> dict[str, Any]:
    """The fields with those of the relation among them instead of below it."""
    return {**{name: value for name, value in fields.items() if name != "relation"}, **relation._asdict()}
