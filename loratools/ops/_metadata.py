"""What people look for in an adapter's metadata, whoever wrote it."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

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
        return json.loads(text) if text else None
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
