"""torchtune's own layout: ``layers.0.attn.q_proj.lora_a.weight``. Read here; alpha lies in the training recipe."""

from __future__ import annotations

from loratools.formats._base import Facts, Format, Group, Scale


def _claims(facts: Facts) -> float:
    return 0.9 if facts.style == "torchtune" else 0.0


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    return Scale(1.0, None, "torchtune keeps alpha in its recipe; a scale of 1 is assumed")


FORMAT = Format(name="torchtune", title="torchtune", claims=_claims, scaler=_scaler, dialect="native")
