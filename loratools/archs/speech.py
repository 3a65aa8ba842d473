"""Speech models: Whisper, wav2vec 2.0 and their relatives, whose paths are their own names in every layout.

Whisper's transformer is spelt as BART's is. Without its convolutions only the base model's name tells.
"""

from __future__ import annotations

from loratools.archs._arch import Arch
from loratools.archs._table import Component

ARCH = Arch(
    name="speech",
    title="speech model",
    components=(Component("speech_model", {"peft": ("base_model.model.",)}),),
    base_models=("whisper", "wav2vec2", "hubert", "wavlm", "mms-", "speecht5", "seamless", "s2t-"),
    markers=(
        "decoder.layers.#.encoder_attn",
        "layers.#.self_attn",
        "layers.#.fc1",
        "layers.#.fc2",
        "encoder.conv1",
        "encoder.conv2",
        "wav2vec2.encoder.layers.#",
        "wav2vec2.feature_projection",
        "wav2vec2_bert.encoder.layers.#",
        "hubert.encoder.layers.#",
        "wavlm.encoder.layers.#",
        "speech_encoder.encoder.layers.#",
    ),
)
