"""What multiplies a module's product, from the statements that go before what its layout says."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from loratools.errors import MalformedFileError, NonFiniteError
from loratools.formats import _peft_config
from loratools.formats._base import Facts, Format, Group, Scale
from loratools.kinds import Kind
from loratools.model import Adapter, Module
from loratools.tensors import TensorRef


def scale_of(
    found: Group, roles: Mapping[str, TensorRef], component: str, kind: Kind, facts: Facts, form: Format
) -> Scale:
    """The scale of a module: its own alpha where it states one, else what the layout says.

    Args:
        found: The module's tensors as spelt.
        roles: Its tensors by role, in their logical orientation.
        component: The component that it belongs to.
        kind: Its kind.
        facts: The file.
        form: The file's layout.

    Raises:
        MalformedFileError: An alpha, or what else multiplies the product, is not a single number.
    """
    # LyCORIS' trained factor; it is usually folded into the weights when they are saved.
    further = _number(roles["scalar"], facts) if "scalar" in roles else 1.0
    if kind.name == "lokr" and {"lokr_w1", "lokr_w2"} <= roles.keys():
        if "alpha" not in roles and str(facts.config.get("peft_type")).upper() == "LOKR":
            # PEFT scales it whatever its factors; LyCORIS only what it has decomposed.
            return form.scaler(found, component, 0, facts)
        return Scale(further, _number(roles["alpha"], facts) if "alpha" in roles else None)
    rank = kind.rank(roles)
    if not rank or not kind.scaled:
        return Scale(1.0)
    if kind.name == "adalora":
        return _pruned(roles, facts, rank)
    if "alpha" in roles:
        alpha = _number(roles["alpha"], facts)
        return Scale(further * alpha / rank, alpha)
    scale = form.scaler(found, component, rank, facts)
    return scale._replace(value=further * scale.value)


def _number(ref: TensorRef, facts: Facts) -> float:
    """A tensor's only value.

    Raises:
        MalformedFileError: It holds more or less than one; the message names the file.
    """
    if ref.numel != 1:
        raise MalformedFileError(
            f"{ref.name} has shape {list(ref.shape)}",
            path=facts.path or None,
            keys=[ref.name],
            expected="A single number was expected",
            todo="The file is damaged; get it again from where it was made",
        )
    return ref.scalar()


def _pruned(roles: Mapping[str, TensorRef], facts: Facts, rank: int) -> Scale:
    """AdaLoRA's scale, as PEFT's SVDLinear has it."""
    alpha = facts.config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        return Scale(1.0, None, "the configuration states no lora_alpha; a scale of 1 is assumed")
    if "ranknum" in roles:
        _number(roles["ranknum"], facts)
    return Scale(alpha / _peft_config.pruned(roles, facts.config, rank), float(alpha))


def summary(notes: Iterable[str]) -> list[str]:
    """One note for each thing said of the scales, however many modules it was said of."""
    unique = list(dict.fromkeys(notes))
    if len(unique) > 3:
        return [*unique[:2], f"{len(unique) - 2} more modules like that"]
    return unique


def nonfinite(modules: Iterable[Module]) -> list[str]:
    """The keys that state a scale of NaN or infinity; the target where no key of its own does."""
    return [
        module.alpha_tensor.name if module.alpha_tensor is not None else str(module.target)
        for module in modules
        if not math.isfinite(module.scale)
    ]


def nonfinite_notes(modules: Collection[Module]) -> list[str]:
    """One note for each way in which scales are not finite, with the first key that states such a one."""
    said: list[str] = []
    for what, odd in (("not a number", math.isnan), ("infinite", math.isinf)):
        found = [module for module in modules if odd(module.scale)]
        if not found:
            continue
        alone = all(module.alpha is None or math.isfinite(module.alpha) for module in found)
        verb = "have a scale" if alone else "state an alpha"
        said.append(
            f"{len(found)} of {len(modules)} modules {verb} that is {what} (first: {nonfinite(found)[0]}): "
            "the strength cannot be computed"
        )
    return said


def refuse_nonfinite(adapter: Adapter) -> None:
    """Refuse an adapter whose modules have no finite scale: reading it says so in a note and goes on.

    Raises:
        NonFiniteError: An alpha is NaN or infinite; all such keys are named.
    """
    keys = nonfinite(adapter.modules.values())
    if keys:
        raise NonFiniteError(
            f"{len(keys)} of {len(adapter.modules)} modules have a scale that is NaN or infinite",
            path=adapter.path or None,
            keys=keys,
            expected="Every alpha must be a finite number",
            todo="The file is damaged; get it again from where it was made",
        )
