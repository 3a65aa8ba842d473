"""PEFT itself: what its own configuration says, of any model that transformers or diffusers make."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

RUNTIME = Runtime(
    name="peft",
    title="PEFT",
    layouts=("peft",),
    source="PEFT 0.21.2 utils/save_and_load.py and tuners/tuners_utils.py",
    kinds=frozenset(
        (
            *(
                "lora",
                "experts",
                "adalora",
                "loha",
                "lokr",
                "ia3",
                "oft",
                "vera",
                "miss",
                "vblora",
                "unilora",
            ),
            *("bdlora", "kasa"),
            *("randlora", "road", "shira", "hra", "delora", "spectral", "full"),
        )
    ),
    ignores={
        "wrapped": "keys that are not the model's are passed over with a warning, and the modules stay as they were",
    },
    configured=True,
)
