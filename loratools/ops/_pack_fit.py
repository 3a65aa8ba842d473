"""Whether an adapter fits a pack: the program that is to serve it, and the base that the others are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools import runtimes
from loratools.errors import ShapeError
from loratools.io.base import keys_of
from loratools.model import Adapter, Layout
from loratools.ops import _doctor_base, _doctor_runtime
from loratools.ops._doctor_case import Case
from loratools.ops._pack_plan import Plan
from loratools.ops.doctor_results import ERROR, Finding
from loratools.runtimes import Runtime


class Fit:
    """What adapters are checked against.

    Args:
        layout: Of the pack.
        runtime: The program, or None.
        base: The base model's path, or empty.
        max_rank: The program's limit of the rank, a count; 0: its usual one.

    Attributes:
        warnings: What does not keep adapters from being served, and how many it was said of.
    """

    def __init__(self, layout: str, runtime: Runtime | None, base: str, max_rank: int) -> None:
        self._layout = layout
        self._runtime = runtime
        self._given = base
        self._base = keys_of(base) if base else None
        self._max_rank = max_rank
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._keys: set[str] = set()
        self._first = ""
        self.warnings: dict[str, int] = {}

    def verdict(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Why the program would not run an adapter as it will be packed, or nothing; and what else is to be said."""
        if plan.causes is None:
            plan.causes = self._checked(plan)
        return plan.causes

    def warn(self, warnings: Sequence[str]) -> None:
        """Count what is said of an adapter."""
        for said in warnings:
            self.warnings[said] = self.warnings.get(said, 0) + 1

    def _checked(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Errors and warnings."""
        # Without a path: how the source's file is called says nothing of the one that the pack will have.
        case = Case(
            "",
            {},
            _config(plan),
            _as_packed(plan, self._layout),
            self._given,
            self._base,
            self._runtime,
            self._max_rank,
        )
        found: list[Finding] = []
        if self._runtime is not None:
            found += _doctor_runtime.checked(case, self._runtime)
        if self._base is not None:
            found += _doctor_base.names(case)
        return (
            [f"{each.what}. {each.why}" for each in found if each.severity == ERROR],
            [f"{each.why}. {each.mend}".rstrip(". ") for each in found if each.severity != ERROR],
        )

    def other_base(self, key: str, shapes: Mapping[str, Sequence[int]]) -> str:
        """Why an adapter is of another base model than those before it; empty where it is not.

        Args:
            key: Of the names and shapes of its modules.
            shapes: Of its modules' weights.
        """
        if key in self._keys:
            return ""
        other = {
            module: shape
            for module, shape in shapes.items()
            if self._shapes.get(module, tuple(shape)) != tuple(shape)
        }
        if not other:
            return ""
        first = next(iter(other))
        error = ShapeError(
            f"{len(other)} of {len(shapes)} modules have other shapes than in the adapters before it: {first} is "
            f"{other[first]}, and {list(self._shapes[first])} from {self._first} on",
            keys=other,
            expected="A pack is of one base model",
            todo="Pack the adapters of another base apart",
        )
        return str(error)

    def accept(self, name: str, key: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Let those that follow have the shapes of an adapter.

        Args:
            name: The adapter's.
            key: Of the names and shapes of its modules.
            shapes: Of its modules' weights.
        """
        if key not in self._keys:
            self._keys.add(key)
            self._first = self._first or name
            self._shapes.update({module: tuple(shape) for module, shape in shapes.items()})


def _as_packed(plan: Plan, layout: str) -> Adapter:
    """The adapter as the pack will have it, as far as its header tells."""
    modules = {
        target: module._replace(scale=1.0, alpha=float(plan.bucket), rank=plan.bucket)
        for target, module in plan.adapter.modules.items()
    }
    return replace(plan.adapter, modules=modules, layout=Layout(layout))


def _config(plan: Plan) -> dict[str, Any]:
    """What the configuration will say."""
    before = plan.adapter.config
    if "peft_type" not in before:
        return {}
    paths = sorted({target.path for target in plan.adapter.modules})
    return {
        **before,
        "r": plan.bucket,
        "lora_alpha": plan.bucket,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": paths,
    }


def program(name: str | None) -> Runtime | None:
    """The program of a name, or None.

    Raises:
        OptionError: There is none.
    """
    return runtimes.get(name) if name else None
