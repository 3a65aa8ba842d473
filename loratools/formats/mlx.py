"""MLX's layout: ``adapters.safetensors`` or ``adapters.npz`` with ``lora_a`` (in, rank) and ``lora_b`` (rank, out).

The scale multiplies the product directly and lies in ``adapter_config.json``, one for all modules, as the rank does;
the trainer's default is 20. ``num_layers`` counts layers from the end of the model, and -1 means all. Experts of a
layer are stacked: ``lora_a`` (experts, rank, in), ``lora_b`` (experts, out, rank). DoRA's ``m`` is (out,), and for an
embedding (words,). Names are mlx-lm's, which are transformers' but for a few families.
Source: mlx-lm ``tuner/lora.py``, ``tuner/dora.py`` and ``tuner/utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools import archs
from loratools.archs._experts import SWITCH
from loratools.errors import LayoutError, MalformedFileError
from loratools.formats import _carried, _names
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.formats._peft_config import as_float
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_DEFAULT_SCALE = 20.0
_ALL_LAYERS = -1
_SUFFIXES = {"down": "lora_a", "up": "lora_b"}
# mlx-lm runs language models; of others nothing is known.
_LANGUAGE = ("llm", "unknown")
# transformers' embeddings of words, by the last word of their paths.
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"})
_LAYER = re.compile(r"(?:^|.*?\.)(?:layers|h|blocks)\.(\d+)\.(.+)")
# Families whose modules mlx-lm calls otherwise than transformers does: pattern and replacement, there and back.
_THERE = (
    (r"gpt_neox\.layers\.(\d+)\.", r"model.h.\1."),
    (r"gpt_neox\.(embed_in|final_layer_norm)$", r"model.\1"),
)
_BACK = (
    (r"model\.h\.(\d+)\.(attention\.|mlp\.dense_)", r"gpt_neox.layers.\1.\2"),
    (r"model\.(embed_in|final_layer_norm)$", r"gpt_neox.\1"),
    (r"model\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)$", r"transformer.\1"),
)
# What of these only GPT-2 has, whose base stores (in, out).
_CONV1D = re.compile(r"model\.h\.\d+\.(?:attn|mlp)\.c_\w+")
_GPT2 = (r"transformer\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)$", r"model.\1")


def translate(groups: Mapping[str, Group]) -> None:
    """Give modules the names that transformers has for them, and embeddings the roles of embeddings.

    Args:
        groups: By stem; those spelt in MLX's style change.
    """
    for found in groups.values():
        if found.style != "mlx":
            continue
        found.in_first = _CONV1D.fullmatch(found.name) is not None
        found.name = _renamed(found.name, _BACK)
        if found.name.rpartition(".")[2] in _EMBEDDINGS and {"up", "down"} <= found.roles.keys():
            found.roles = {
                f"embedding_{role}" if role in _SUFFIXES else role: ref for role, ref in found.roles.items()
            }


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A name by the first rule that it begins with."""
    for pattern, replacement in rules:
        new, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return new
    return name


def _claims(facts: Facts) -> float:
    return 0.9 if facts.style == "mlx" else 0.0


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    parameters = facts.config.get("lora_parameters") or {}
    stated = parameters.get("scale") if isinstance(parameters, dict) else parameters
    if isinstance(stated, int | float) and not isinstance(stated, bool):
        return Scale(as_float(stated))
    if stated is not None:
        raise MalformedFileError(
            f"lora_parameters.scale of adapter_config.json is {stated!r}",
            path=facts.path or None,
            expected="A number was expected, which multiplies the product of the factors",
            todo="Correct it in adapter_config.json; the configuration of the training has the true one",
        )
    return Scale(
        _DEFAULT_SCALE,
        None,
        f"no configuration states MLX's scale; its default of {_DEFAULT_SCALE:g} is assumed",
    )


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    _refuse_others(module, adapter, layout)
    name = _own(module, adapter, layout)
    tensors = []
    for role, ref in module.factors.items():
        # The factors of stacked experts lie as ours do.
        turned = ref if module.kind == "experts" else ref.flipped()
        tensors.append(turned.renamed(f"{name}.{_SUFFIXES[role]}"))
    if module.magnitude is not None:
        magnitude = module.magnitude
        tensors.append(magnitude.reshaped((magnitude.numel,)).renamed(f"{name}.m"))
    return tensors


def _own(module: Module, adapter: Adapter, layout: Layout) -> str:
    """The module as mlx-lm's models call it."""
    path = _names.body(adapter.arch, module.target, "native", ".", layout)
    # Only GPT-2 stores (in, out); other families keep "transformer." in mlx-lm, too.
    turned = bool(adapter.config.get("fan_in_fan_out")) or (module.in_first and module.op == "linear")
    return _renamed(path, (_GPT2,)) if turned else _renamed(path, _THERE)


def _refuse_others(module: Module, adapter: Adapter, layout: Layout) -> None:
    """Refuse what mlx-lm's layers have no parameters for.

    Raises:
        LayoutError: The module is of another kind of model, of another kind, or of a second component.
    """
    own, keys = module.target.component, [str(module.target)]
    stacked = module.kind == "experts"
    if adapter.arch not in _LANGUAGE:
        raise cannot_hold(layout, f"adapters of {archs.get(adapter.arch).title}", keys)
    if own != _names.main_component(adapter):
        raise cannot_hold(layout, f"more than one component: a {own} beside another", keys)
    if module.kind not in ("lora", "experts") or module.factors.keys() != _SUFFIXES.keys():
        raise cannot_hold(layout, f"modules of kind {module.kind} with {', '.join(module.factors)}", keys)
    if any(len(ref.shape) != (3 if stacked else 2) for ref in module.factors.values()):
        what = "experts that are packed in two axes" if stacked else "convolutions"
        raise cannot_hold(layout, what, keys)
    wanted = "in" if module.op == "embedding" else "out"
    if module.magnitude is not None and (stacked or module.magnitude_axis != wanted):
        per = "output" if wanted == "in" else "input"
        raise cannot_hold(layout, f"a DoRA magnitude per {per} of such a layer", keys)


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    _names.refuse_mixture(adapter, layout)
    modules = list(adapter.modules.values())
    _refuse_several(adapter, "rank", sorted({module.rank or 0 for module in modules}), layout)
    _refuse_several(adapter, "scale", sorted({module.scale for module in modules}), layout)
    names = [_own(module, adapter, layout) for module in modules]
    start = next(iter(_carried.configs(adapter).values()), {})
    dropout = start.get("lora_dropout")
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if any(module.magnitude is not None for module in modules) else "lora",
        "num_layers": _ALL_LAYERS,
        "lora_parameters": {
            "rank": modules[0].rank,
            "scale": modules[0].scale,
            "dropout": dropout if isinstance(dropout, int | float) else 0.0,
            "keys": sorted({_within(name) for name in names}),
        },
    }
    if start.get("base_model_name_or_path"):
        config["model"] = start["base_model_name_or_path"]
    return Document(tuple(tensors), _carried.metadata(adapter), config)


def _refuse_several(adapter: Adapter, what: str, values: list[float], layout: Layout) -> None:
    if len(values) > 1:
        raise LayoutError(
            f"the {layout.name} layout has one {what} for all modules, and these have {len(values)}",
            path=adapter.path or None,
            keys=[f"{value:g}" for value in values],
            todo="`loratools convert FILE --to mlx` brings them to one",
        )


def _within(name: str) -> str:
    """A module's name within its layer, or its whole name where it is in none: mlx-lm looks up both."""
    found = _LAYER.fullmatch(name)
    return found[2] if found is not None else name


def _for_base(document: Document, base: Mapping[str, Any], count: int) -> Document:
    """The document for a base: how many layers from its end are adapted, and how the base is quantised."""
    config = dict(document.config or {})
    layers = [int(found[1]) for ref in document.tensors if (found := _LAYER.fullmatch(ref.name))]
    if count and layers and max(layers) < count:
        config["num_layers"] = count - min(layers)
    if isinstance(base.get("quantization"), Mapping):
        config["quantization"] = base["quantization"]
    return document._replace(config=config)


FORMAT = Format(
    name="mlx",
    title="MLX",
    claims=_claims,
    scaler=_scaler,
    flipped=lambda _: True,
    speller=_speller,
    finisher=_finisher,
    folder=True,
    weights="adapters.safetensors",
    roles=frozenset({"up", "down", "magnitude", "magnitude_in"}),
    dialect="native",
    alpha="file",
    single=True,
    uniform=True,
    one_rank=True,
    fields=frozenset(),
    for_base=_for_base,
    embedding_axis="in",
    experts=(SWITCH,),
)
