"""MLX's layout: ``adapters.safetensors`` or ``adapters.npz`` with ``lora_a`` (in, rank) and ``lora_b`` (rank, out).

The scale multiplies the product directly and lies in ``adapter_config.json``; the trainer's default is 20.
Source: mlx-lm ``tuner/lora.py`` and ``tuner/utils.py``.
"""

from __future__ import annotations

from loratools.formats._base import Facts, Format, Group, Scale

_DEFAULT_SCALE = 20.0


def _claims(facts: Facts) -> float:
    return 0.9 if facts.style == "mlx" else 0.0


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    parameters = facts.config.get("lora_parameters")
    stated = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(stated, int | float):
        return Scale(float(stated))
    return Scale(
        _DEFAULT_SCALE,
        None,
        f"no configuration states MLX's scale; its default of {_DEFAULT_SCALE:g} is assumed",
    )


FORMAT = Format(
    name="mlx",
    title="MLX",
    claims=_claims,
    scaler=_scaler,
    flipped=lambda _: True,
    folder=True,
    weights="adapters.safetensors",
    dialect="native",
)
