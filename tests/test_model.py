"""The common model: values, equal by what they say."""

from __future__ import annotations

from fractions import Fraction

import pytest

from loratools.model import Adapter, Layout, Module, Rows, Target
from loratools.tensors import from_scalar


def module(component: str, path: str, kind: str = "lora") -> Module:
    return Module(Target(component, path), kind, {})


def test_rows_are_shares_of_a_weight() -> None:
    assert Fraction(Rows(((3, 7),), 7).shares, 7) == Fraction(4, 7)
    assert Rows(((1, 2), (0, 1)), 2).shares == 2


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (Target("denoiser", "a.b"), "a.b"),
        (Target("denoiser", "a.b", Rows(((0, 1),), 3)), "a.b[0:1/3]"),
        (Target("denoiser", "a.b", Rows(((1, 2), (0, 1)), 2)), "a.b[1:2+0:1/2]"),
    ],
)
def test_a_target_in_words(target: Target, text: str) -> None:
    assert str(target) == text


def test_targets_are_equal_by_what_they_name() -> None:
    one, same = Target("d", "x", Rows(((0, 1),), 3)), Target("d", "x", Rows(((0, 1),), 3))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Target("d", "x")
    assert one != Target("d", "x", Rows(((0, 1),), 2))
    assert one != Target("e", "x", Rows(((0, 1),), 3))


def test_targets_with_and_without_rows_have_one_order() -> None:
    targets = [Target("d", "x", Rows(((0, 1),), 3)), Target("d", "x"), Target("a", "z"), Target("d", "a")]
    assert [str(target) for target in sorted(targets, key=lambda target: target.sort_key)] == [
        "z",
        "a",
        "x",
        "x[0:1/3]",
    ]


def test_a_layout_in_words() -> None:
    assert str(Layout("kohya")) == "kohya"
    assert str(Layout("diffusers", "attn-procs")) == "diffusers (attn-procs)"


def test_an_adapter_counts_kinds_and_groups_components() -> None:
    modules = [module("d", "x"), module("t", "y"), module("d", "z", "loha")]
    adapter = Adapter({each.target: each for each in modules})
    assert adapter.kinds == {"lora": 2, "loha": 1}
    assert {name: [str(m.target) for m in members] for name, members in adapter.components().items()} == {
        "d": ["x", "z"],
        "t": ["y"],
    }


def test_a_module_lists_its_tensors_with_their_roles() -> None:
    refs = {name: from_scalar(name, 1.0) for name in ("alpha", "up", "down", "magnitude")}
    whole = Module(
        Target("d", "x"),
        "lora",
        {"up": refs["up"], "down": refs["down"]},
        alpha_tensor=refs["alpha"],
        magnitude=refs["magnitude"],
    )
    assert [role for role, _ in whole.tensors()] == ["alpha", "up", "down", "magnitude"]
    assert all(ref.name == role for role, ref in whole.tensors())


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        module("d", "x").kind = "loha"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Target("d", "x").path = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Adapter({}).metadata["x"] = "y"  # type: ignore[index]
