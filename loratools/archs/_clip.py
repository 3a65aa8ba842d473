"""The CLIP text encoders, in Hugging Face's names and in OpenCLIP's.

transformers 5.6 took the ``text_model`` level out of ``CLIPTextModel`` (``CLIPTextModelWithProjection`` kept
it): adapters saved since then lack it, which is the dialect "transformers5".
"""

from __future__ import annotations

from loratools.archs._table import Row, Table, same

_HUGGING_FACE = (
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    "text_model.encoder.layers.{}.layer_norm1",
    "text_model.encoder.layers.{}.self_attn.q_proj",
    "text_model.encoder.layers.{}.self_attn.k_proj",
    "text_model.encoder.layers.{}.self_attn.v_proj",
    "text_model.encoder.layers.{}.self_attn.out_proj",
    "text_model.encoder.layers.{}.layer_norm2",
    "text_model.encoder.layers.{}.mlp.fc1",
    "text_model.encoder.layers.{}.mlp.fc2",
    "text_model.final_layer_norm",
)

_OPENCLIP: tuple[Row, ...] = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding"),
    ("transformer.resblocks.{}.ln_1", "text_model.encoder.layers.{}.layer_norm1"),
    (
        "transformer.resblocks.{}.attn.in_proj",
        (
            "text_model.encoder.layers.{}.self_attn.q_proj",
            "text_model.encoder.layers.{}.self_attn.k_proj",
            "text_model.encoder.layers.{}.self_attn.v_proj",
        ),
    ),
    ("transformer.resblocks.{}.attn.out_proj", "text_model.encoder.layers.{}.self_attn.out_proj"),
    ("transformer.resblocks.{}.ln_2", "text_model.encoder.layers.{}.layer_norm2"),
    ("transformer.resblocks.{}.mlp.c_fc", "text_model.encoder.layers.{}.mlp.fc1"),
    ("transformer.resblocks.{}.mlp.c_proj", "text_model.encoder.layers.{}.mlp.fc2"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", None),
)


def _without_text_model(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    def short(name: str) -> str:
        return name.removeprefix("text_model.")

    return tuple(
        (
            native,
            tuple(short(str(piece)) for piece in twin) if isinstance(twin, tuple) else short(twin or native),
        )
        for native, twin in rows
    )


_CLIP_ROWS = same(*_HUGGING_FACE)

CLIP = Table(_CLIP_ROWS, {"transformers5": _without_text_model(_CLIP_ROWS)})
OPENCLIP = Table(_OPENCLIP, {"transformers5": _without_text_model(_OPENCLIP)})

# Where CLIP's matrices read the hidden state: their input width is the encoder's.
CLIP_READS_HIDDEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
)
OPENCLIP_READS_HIDDEN = ("attn.in_proj", "attn.out_proj", "mlp.c_fc")
