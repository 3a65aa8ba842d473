"""The engine of dry runs that compute: it gives the results, and knows what the plan would cost."""

from __future__ import annotations

import pytest

from loratools.engine import Item, Plan, kept
from loratools.engine.foreseen import Foreseen


class Elsewhere:
    """An engine of other processes, which a dry run has no use for."""

    remote = True
    devices = ()
    device_kind = "cpu"

    def run(self, plan):
        raise AssertionError("a dry run was sent elsewhere")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(bytes(1 << 16))
    return path


def _plan(count):
    items = [Item(f"{number}", read=1 << 10, cost=1.0, kind="k") for number in range(count)]
    return Plan(lambda number: number**2, list(range(count)), items)


def test_results_are_computed_here_and_every_plan_is_measured(source, tmp_path):
    found = Foreseen(Elsewhere(), 64, inputs=[source], output=tmp_path / "out")
    for count in (3, 5):
        plan = _plan(count)
        assert dict(kept.run(plan, found, None, None)) == {number: number**2 for number in range(count)}
    assert [len(each.items) for each in found.passes] == [3, 5]
    assert all(each.rates.operation.keys() == {"k"} for each in found.passes)
    assert (found.remote, found.device_kind) == (False, "cpu")
    assert [each.name for each in tmp_path.iterdir()] == ["in"]
    assert found.outside >= 0.0


def test_a_plan_of_nothing_is_not_measured(source, tmp_path):
    found = Foreseen(None, 2, inputs=[source], output=tmp_path / "out")
    assert list(found.run(_plan(0))) == []
    assert found.passes == []
