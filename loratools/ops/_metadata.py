"""What people look for in an adapter's metadata, whoever wrote it."""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from loratools.formats._patterns import Pattern, pattern
from loratools.io import json_text
from loratools.ops.results import ModuleInfo

_EMPTY_HASH = "e3b0c442"
_SIMPLE = (
    ("title", ("modelspec.title", "ss_output_name", "name")),
    ("author", ("modelspec.author",)),
    ("description", ("modelspec.description",)),
    ("license", ("modelspec.license",)),
    ("trigger phrase", ("modelspec.trigger_phrase",)),
    ("network", ("ss_network_module",)),
    ("network args", ("ss_network_args",)),
    ("optimizer", ("ss_optimizer",)),
    ("learning rate", ("ss_learning_rate",)),
    ("unet learning rate", ("ss_unet_lr",)),
    ("text encoder learning rate", ("ss_text_encoder_lr",)),
    ("resolution", ("ss_resolution", "modelspec.resolution")),
    ("images", ("ss_num_train_images",)),
    ("epochs", ("ss_epoch", "ss_num_epochs")),
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("comment", ("ss_training_comment",)),
    ("model hash", ("sshs_model_hash",)),
    ("legacy hash", ("sshs_legacy_hash",)),
)
_BASE = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
# Finite alphas that no training means: what they are, what follows from them, and how they are told. The reader notes
# those that are not finite.
_ODD: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (
        "of 0",
        "by alpha / rank it changes nothing, but some readers take 0 for the rank",
        lambda alpha: alpha == 0,
    ),
    ("below 0", "what was trained is taken away", lambda alpha: -math.inf < alpha < 0),
)


def training(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Base model, trainer, trigger words, date, steps and hashes, as far as they are stated."""
    found: dict[str, Any] = {}
    base = config.get("base_model_name_or_path") or config.get("model")
    base = base or next((metadata[key] for key in _BASE if _said(metadata.get(key))), None)
    if base:
        found["base model"] = str(base)
    trainer = _trainer(metadata, config)
    if trainer:
        found["trainer"] = trainer
    date = _date(metadata)
    if date:
        found["date"] = date
    for name, keys in _SIMPLE:
        value = next((metadata[key] for key in keys if _said(metadata.get(key))), None)
        if value is not None:
            found[name] = value
    tags = tag_frequency(metadata)
    if tags:
        found["tags"] = dict(tags.most_common(50))
    return found


def _said(value: str | None) -> bool:
    return value not in (None, "", "None", "null", "{}")


def _trainer(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    software = _json(metadata.get("software"))
    if isinstance(software, dict) and software.get("name"):
        return f"{software['name']} {software.get('version', '')}".strip()
    if _said(metadata.get("modelspec.implementation_version")):
        return metadata["modelspec.implementation_version"]
    if any(key.startswith("ss_") for key in metadata):
        return "sd-scripts"
    if "peft_type" in config:
        return f"PEFT {config.get('peft_version') or ''}".strip()
    return ""


def _date(metadata: Mapping[str, str]) -> str:
    stamp = metadata.get("ss_training_finished_at") or metadata.get("ss_training_started_at") or ""
    try:
        moment = datetime.datetime.fromtimestamp(float(stamp), datetime.timezone.utc)
        return moment.isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return metadata.get("modelspec.date", "")


def tag_frequency(metadata: Mapping[str, str]) -> Counter[str]:
    """How often each tag stood in the training captions, over all folders of images."""
    counts: Counter[str] = Counter()
    for tags in tag_folders(metadata).values():
        counts.update(tags)
    return counts


def tag_folders(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Kohya's ``ss_tag_frequency``: how often each tag stood in the captions of each folder of images."""
    stated = _json(metadata.get("ss_tag_frequency"))
    folders: dict[str, dict[str, int]] = {}
    for folder, tags in stated.items() if isinstance(stated, dict) else ():
        if isinstance(tags, dict):
            folders[folder] = {
                str(tag).strip(): count for tag, count in tags.items() if isinstance(count, int)
            }
    return folders


def _json(text: str | None) -> Any:
    try:
        return json_text.loads(text) if text else None
    except ValueError:
        return None


def contradictions(metadata: Mapping[str, str], ranks: Mapping[int, int]) -> list[str]:
    """Where the metadata says something that the tensors do not."""
    said: list[str] = []
    dim = metadata.get("ss_network_dim", "")
    if dim.isdigit() and ranks and int(dim) not in ranks:
        shown = ", ".join(str(rank) for rank in sorted(ranks)[:5])
        said.append(f"the metadata says rank {dim} (ss_network_dim), the modules have rank {shown}")
    if metadata.get("sshs_model_hash", "").startswith(_EMPTY_HASH):
        said.append("the metadata's model hash is that of an empty file (sshs_model_hash)")
    return said


def alphas(metadata: Mapping[str, str], modules: Sequence[ModuleInfo]) -> list[str]:
    """What is odd about the strength that the modules state, and where it is not what was trained."""
    said: list[str] = []
    # Where there is no rank to divide by, alpha is something else: OFT's constraint.
    stated = [module for module in modules if module.alpha is not None and module.rank is not None]
    for what, meaning, odd in _ODD:
        found = [module for module in stated if odd(module.alpha or 0.0)]
        if found:
            said.append(
                f"{len(found)} of {len(modules)} modules state an alpha {what} (first: {found[0].target}): {meaning}"
            )
    dim, alpha = _number(metadata.get("ss_network_dim")), _number(metadata.get("ss_network_alpha"))
    if dim and alpha and not _several_ranks(metadata):
        said += _stale(modules, dim, alpha)
    return said


def _number(text: str | None) -> float:
    """A finite number, or 0 where there is none."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _several_ranks(metadata: Mapping[str, str]) -> bool:
    """Whether the training gave linear modules other ranks than ``ss_network_dim`` on purpose.

    sd-scripts' ``block_dims``, Flux's ``img_attn_dim`` and their like; ``conv_dim`` is of kernels alone.
    """
    stated = _json(metadata.get("ss_network_args"))
    names = stated if isinstance(stated, dict) else {}
    return any(name.endswith(("_dim", "_dims")) and name != "conv_dim" for name in names)


def _stale(modules: Sequence[ModuleInfo], dim: float, alpha: float) -> list[str]:
    """Modules whose rank was changed after the training, by a resize or by fusing, and whose alpha was not."""
    groups: dict[int, list[ModuleInfo]] = {}
    for module in modules:
        kernel = math.prod((module.shape or ())[2:])
        if module.kind != "lora" or not module.rank or module.rank == dim or kernel > 1:
            continue
        # float16 rounds an alpha to three digits.
        if module.alpha is not None and math.isclose(module.alpha, alpha, rel_tol=1e-3):
            groups.setdefault(module.rank, []).append(module)
    return [
        f"{len(found)} of {len(modules)} modules have rank {rank} and alpha {alpha:g}, a scale of {alpha / rank:.4g}; "
        f"they were trained with rank {dim:g} and alpha {alpha:g}, a scale of {alpha / dim:.4g} (ss_network_dim, "
        f"ss_network_alpha): if only their rank was changed since, the strength is {dim / rank:.4g} times what was "
        f"trained (first: {found[0].target})"
        for rank, found in groups.items()
    ]


def patterns(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Modules for which two of PEFT's patterns match and disagree.

    PEFT takes the first that matches, and sorts them when it saves, so that saving can change a module's scale.

    Args:
        config: adapter_config.json.
        names: The modules' dotted paths as PEFT sees them.
    """
    said: list[str] = []
    modules = list(names)
    for field in ("rank_pattern", "alpha_pattern"):
        stated = config.get(field)
        if not isinstance(stated, Mapping) or len({str(value) for value in stated.values()}) < 2:
            continue
        rules = _Rules(stated)
        matching = ((name, rules.matching(name)) for name in modules)
        found = [(name, each) for name, each in matching if len({str(stated[rule]) for rule in each}) > 1]
        if found:
            name, each = found[0]
            values = ", ".join(f"{rule!r} says {stated[rule]}" for rule in each[:3])
            said.append(
                f"{field} is ambiguous for {len(found)} of {len(modules)} modules (first: {name}: {values}): the "
                "first one counts, and PEFT sorts them when it saves"
            )
    return said


class _Rules:
    """Patterns by PEFT's rule: each may match any dotted tail of a module's name.

    Most are plain names, of which there may be one for each module: these are looked up and not tried in turn.
    """

    def __init__(self, stated: Iterable[str]) -> None:
        self._plain: dict[str, list[str]] = {}
        self._others: list[tuple[str, Pattern]] = []
        for rule in stated:
            name = re.sub(r"\\(\W)", r"\1", rule.removeprefix("^"))
            if re.fullmatch(r"[\w.-]+", name):
                anchor = "^" if rule.startswith("^") else ""
                self._plain.setdefault(anchor + name, []).append(rule)
                continue
            with suppress(re.error):  # which the reader takes for a plain name
                self._others.append((rule, pattern(rule, tail=True)))

    def matching(self, name: str) -> list[str]:
        """The patterns that match a module."""
        found = list(self._plain.get("^" + name, ()))
        tail, dot = name, "."
        while dot:
            found += self._plain.get(tail, ())
            _, dot, tail = tail.partition(".")
        return found + [rule for rule, ready in self._others if ready.matches(name)]
