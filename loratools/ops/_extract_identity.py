"""What tells an extraction from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.io.work_folder import Identity
from loratools.ops import _identity_of

if TYPE_CHECKING:
    from loratools.ops._extract_run import Extraction


def of(planned: Extraction) -> Identity:
    """The identity of an extraction.

    Raises:
        OSError: An input is gone.
    """
    asked = planned.options
    options = {
        **asked._asdict(),
        "components": sorted(asked.components) if asked.components is not None else None,
        "include": [pattern.pattern for pattern in asked.include],
        "exclude": [pattern.pattern for pattern in asked.exclude],
        "arch": planned.compared.arch,
        "to": planned.form.name,
        "container": planned.container,
        "device": _identity_of.computed_on(planned.device, planned.engine),
    }
    inputs = {side.base.path: _identity_of.of_base(side.base) for side in (planned.base, planned.tuned)}
    return _identity_of.identity("extract", inputs, options)
