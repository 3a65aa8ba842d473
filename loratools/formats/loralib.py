"""loralib and hand-written modules in its manner: bare ``lora_A`` and ``lora_B`` parameters without ``.weight``.

No file of this kind states alpha. Some store the factors transposed: lora_A (in, rank), lora_B (rank, out).
Source: microsoft/LoRA ``loralib/layers.py``.
"""

from __future__ import annotations

from loratools.formats._base import Facts, Format, Group, Scale


def _claims(facts: Facts) -> float:
    return 0.5 if facts.style == "loralib" else 0.0


def _flipped(facts: Facts) -> bool:
    """Whether only the transposed reading makes the ranks agree in every module."""
    pairs = [
        (group.roles["down"].shape, group.roles["up"].shape)
        for group in facts.groups.values()
        if {"up", "down"} <= group.roles.keys()
    ]
    plain = all(len(down) == len(up) == 2 and down[0] == up[1] for down, up in pairs)
    turned = all(len(down) == len(up) == 2 and down[1] == up[0] for down, up in pairs)
    return turned and not plain


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    return Scale(1.0, None, "the file states no alpha; a scale of 1 is assumed")


FORMAT = Format(
    name="loralib",
    title="loralib",
    claims=_claims,
    variant=lambda facts: "transposed" if _flipped(facts) else "",
    scaler=_scaler,
    flipped=_flipped,
    dialect="native",
)
