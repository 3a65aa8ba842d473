"""What every runtime declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# What an adapter may use that some runtimes do not know, and what it is called in messages.
FEATURES: Mapping[str, str] = {
    "ranks": "ranks that differ between modules",
    "layer_ranks": "ranks that differ between the layers of one target",
    "scales": "scales that differ between modules",
    "header_scale": "scales that the header alone states (lora_adapter_metadata)",
    "rslora": "a scale of alpha / sqrt(rank) (use_rslora)",
    "dora": "DoRA's magnitudes",
    "dora_scale": "DoRA's magnitudes as Kohya and LyCORIS write them (dora_scale)",
    "dora_vector": "DoRA's magnitudes as PEFT writes them (lora_magnitude_vector)",
    "bias": "biases of the base's layers (bias)",
    "lora_bias": "biases of lora_B (lora_bias)",
    "whole": "modules saved in full (modules_to_save)",
    "embedding": "embeddings' factors",
    "tokens": "rows for single tokens (trainable_token_indices)",
    "conv": "convolutions",
    "mid": "convolutions in three factors (lora_mid)",
    "fused_experts": "factors for all experts of a layer at once (target_parameters)",
    "split_experts": "modules for single experts",
    "regex_targets": "target_modules as a regular expression",
    "mutated_base": "an initialisation that changes the base (PiSSA, OLoRA, CorDA, LoftQ)",
    "layer_replication": "layers that are used several times (layer_replication)",
    "alora": "activation by an invocation (aLoRA)",
    "variant": "another formula than B · A (kasa_config, use_qalora, use_bdlora, arrow_config)",
    "wrapped": "keys with a missing or doubled prefix, a framework's wrapper or an adapter's name in them",
    "default_name": "keys with the adapter's name left in them, where it is PEFT's usual one (default)",
}


class Pair(NamedTuple):
    """Modules that have to come together, by the last name of their paths.

    Attributes:
        there: Where a layer has this one …
        needed: … it must have this one, too.
    """

    there: str
    needed: str


class Runtime(NamedTuple):
    """One program that runs adapters.

    Attributes:
        name: As in ``--for`` and ``--to``.
        title: What people call it.
        layouts: The layouts that it loads; the first is the one to write for it.
        source: Where its behaviour was read: project, version, file.
        kinds: The adapter kinds that it applies.
        refuses: By feature (see ``FEATURES``), what it says or does when it refuses an adapter that uses it.
        ignores: By feature, what goes wrong in silence, or nearly so. Features in neither are applied as PEFT does.
        ranks: The values that its limit of the rank may be set to, ascending; empty where there is no limit.
        usual_rank: Its limit unless the user sets another; 0 where there is none.
        pairs: Modules that have to come together.
        families: The kinds of models that it runs: "language", "speech", "vision", "image"; empty for all.
        option: How a user raises the limit of the rank, with ``{}`` for the rank.
        every_layer: Whether it leaves out a target that any layer lacks.
        configured: Whether it needs the configuration beside the weights.
        containers: Those of the files that it reads; empty where any of its layouts' will do.
        by_base: Whether what is written for it depends on the base's configuration (its count of heads).
        normal: Whether ``convert --to`` takes its name and writes what it can hold.
    """

    name: str
    title: str
    layouts: tuple[str, ...]
    source: str
    kinds: frozenset[str] = frozenset({"lora"})
    refuses: Mapping[str, str] = {}
    ignores: Mapping[str, str] = {}
    ranks: tuple[int, ...] = ()
    usual_rank: int = 0
    pairs: tuple[Pair, ...] = ()
    families: frozenset[str] = frozenset()
    option: str = ""
    every_layer: bool = False
    configured: bool = False
    by_base: bool = False
    containers: tuple[str, ...] = ()
    normal: bool = False

    def holds(self, feature: str) -> bool:
        """Whether it applies what an adapter does with this feature."""
        return feature not in self.refuses and feature not in self.ignores
