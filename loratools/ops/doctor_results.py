"""What ``doctor`` returns: plain values that a report shows and ``--json`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

ERROR, WARNING, INFO = "error", "warning", "info"

CODES: Mapping[str, str] = {
    "unreadable": "the file cannot be read",
    "not-an-adapter": "the file is something else",
    "incomplete-pairs": "modules without all of their factors",
    "shapes": "factors that do not fit each other",
    "empty-tensors": "tensors without elements",
    "prefix-doubled": "keys with PEFT's prefix more than once",
    "prefix-missing": "PEFT's keys without its prefix",
    "prefix-wrapped": "keys with a training framework's wrapper in them",
    "adapter-name": "keys with the adapter's name left in them",
    "malformed-keys": "keys like Kohya's with a doubled prefix or a missing dot",
    "mixed-styles": "keys of several layouts in one file",
    "no-config": "no configuration beside the weights",
    "rank-contradicts": "ranks that are not those of the configuration",
    "targets-contradict": "modules that target_modules leaves out",
    "method-contradicts": "another peft_type than the tensors'",
    "dora-contradicts": "magnitudes without use_dora, or the other way round",
    "whole-missing": "modules_to_save without their tensors",
    "pattern-invalid": "patterns that do not compile",
    "pattern-order": "patterns whose order decides",
    "unknown-fields": "fields of the configuration that PEFT does not know",
    "mutated-base": "factors that belong to a changed base",
    "base-layer": "weights of the base beside the factors",
    "unknown-alpha": "no alpha is stated",
    "stale-alpha": "an alpha of before a change of rank",
    "odd-alpha": "an alpha of 0 or below",
    "nonfinite-scale": "a scale of NaN or infinity",
    "metadata-contradicts": "metadata that the tensors contradict",
    "dora-mixed": "DoRA beside plain LoRA",
    "unclaimed": "tensors that belong to no module",
    "nonfinite": "NaN or Inf among the values",
    "untrained": "factors of zero everywhere",
    "zero-modules": "factors of zero in some modules",
    "overflow": "values beyond float16",
    "base-unreadable": "the base cannot be read",
    "not-in-base": "modules that the base does not have",
    "shape-differs": "modules of another shape than the base's",
    "vocabulary": "another vocabulary than the base's",
    "other-names": "other names than the base's",
    "layout": "a layout that the program does not read",
    "file-name": "a file of another name than the program looks for",
    "kind": "a kind that the program does not apply",
    "family": "a kind of model that the program does not run",
    "rank-limit": "ranks over the program's limit",
    "partner-missing": "modules without those that the program needs beside them",
    "layers-missing": "targets that the program leaves out, since some layer lacks them",
    "refused": "a feature at which the program stops",
    "ignored": "a feature that the program passes over",
    "note": "what the reader noted",
}


class Finding(NamedTuple):
    """One thing that is wrong, or worth knowing.

    Attributes:
        code: A key of ``CODES``.
        severity: "error" (it would not load, or do something else), "warning" or "info".
        what: What was found, with counts and the first keys.
        why: Why it matters.
        mend: What to do where no command helps, or beside it; may be empty.
        command: The command line that mends it, or empty.
        keys: All tensor names, modules or fields that it is about.
        feature: For "refused" and "ignored": a key of :data:`loratools.runtimes.FEATURES`.
    """

    code: str
    severity: str
    what: str
    why: str
    mend: str = ""
    command: str = ""
    keys: tuple[str, ...] = ()
    feature: str = ""


class DoctorReport(NamedTuple):
    """What ``doctor`` found.

    Attributes:
        path: As it was given.
        layout: The layout's name, or "unknown".
        arch: The architecture's name, or "unknown".
        runtime: The program that was asked for, or empty.
        base: The base model that was given, or empty.
        modules: How many modules the adapter has.
        findings: Errors first, then warnings, then the rest.
    """

    path: str
    layout: str
    arch: str
    runtime: str
    base: str
    modules: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether it would work: there is no error among the findings."""
        return not any(finding.severity == ERROR for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each severity."""
        found = [finding.severity for finding in self.findings]
        return {severity: found.count(severity) for severity in (ERROR, WARNING, INFO)}


def named(keys: Iterable[str], word: str, *, of: int = 0) -> str:
    """``3 of 8 modules (first: a, b)``: a count, and the first names.

    Args:
        keys: All of them.
        word: What they are, in the singular.
        of: How many there are in all; 0 where that says nothing.
    """
    found = list(keys)
    many = f"{len(found):,}" + (f" of {of:,}" if of else "")
    plural = word if max(of, len(found)) == 1 else f"{word}s"
    return (
        f"{many} {plural} (first: {', '.join(found[:2])})"
        if len(found) > 1
        else f"{many} {plural} ({found[0]})"
    )
