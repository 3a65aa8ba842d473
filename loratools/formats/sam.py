"""LoRA for vision transformers as Sam_LoRA saves it: ``w_a_000`` and ``w_b_000``, modules numbered, no names.

The numbers run over the blocks, q and v of each. No file states alpha; the code multiplies by 1.
Source: JamesQFreeman/LoRA-ViT ``lora.py``, MathieuNlp/Sam_LoRA ``src/lora.py``.
"""

from __future__ import annotations

from loratools.formats._base import Facts, Format


def _claims(facts: Facts) -> float:
    return 1.0 if facts.style == "sam" else 0.0


FORMAT = Format(name="sam", title="Sam_LoRA", claims=_claims, variant=lambda _: "w_a_b", dialect="native")
