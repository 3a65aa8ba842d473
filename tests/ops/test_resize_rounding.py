"""What a resize says of the rounding of its store dtype."""

from __future__ import annotations

import factories
import numpy as np
import pytest

import loratools as lt
from loratools.ops.resize import resize


@pytest.mark.parametrize("alpha", [1e-20, 1e-12])
def test_the_error_is_true_where_rounding_leaves_little(tmp_path, alpha):
    """Values that float16 has a digit for, or none."""
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", only=["to_q", "to_k", "fc1"], alpha=alpha)
    result, report = resize(lt.load(made.path), rank=2, dtype="float16")
    found = factories.deltas_of(result)
    for each in report.modules:
        delta = made.deltas[factories.key_of(each.component, each.target)]
        after = found[factories.key_of(each.component, each.target)]
        assert each.error == pytest.approx(np.linalg.norm(after - delta) / np.linalg.norm(delta), rel=0.05)
    assert any("choose --dtype float32" in note for note in report.notes)


def test_an_error_below_the_store_dtypes_rounding_is_said(tmp_path):
    made = factories.kohya(tmp_path / "in.safetensors", "sd15", rank=6)
    for dtype, said in (("bfloat16", True), ("float32", False)):
        _, report = resize(lt.load(made.path), error=1e-3, dtype=dtype)
        assert any("above 0.001 by the rounding" in note for note in report.notes) == said
        assert (max(each.error for each in report.modules) > 1e-3) == said
