"""The files of one adapter of a pack: what follows from its header is made once for all that share it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from loratools import formats, io
from loratools.io import unchanged
from loratools.io.writer import data_of
from loratools.ops import _pack_index, files
from loratools.tensors import TensorRef

_BUFFER = 1 << 20  # bytes: tensors are small, and each call of the system is not


class Prepared(NamedTuple):
    """A document ready to be written.

    Attributes:
        document: What is written.
        form: Its layout.
        start: The first bytes of the weights.
        refs: The tensors that follow, in order.
        config: The configuration beside it, or None.
        size: Bytes of all files.
    """

    document: formats.Document
    form: formats.Format
    start: bytes
    refs: tuple[TensorRef, ...]
    config: bytes | None
    size: int

    def write(self, path: Path) -> str:
        """Write into a folder that nobody reads yet: no name has to wait for the disk.

        Args:
            path: A file, or a folder where the layout wants one.

        Returns:
            The sha256 of the weights.
        """
        weights = path / self.form.weights if self.form.folder else path
        weights.parent.mkdir(parents=True, exist_ok=True)
        if self.document.computed:  # digests of its own data, which the usual writer knows how to make
            with unchanged.apart():  # the pack as a whole is checked when it takes its name
                files.write(self.document, self.form, path, overwrite=True)
            return _pack_index.file_digest(weights)
        digest = hashlib.sha256(self.start)
        with open(weights, "wb", buffering=_BUFFER) as file:
            file.write(self.start)
            for ref in self.refs:
                data = data_of(ref)
                digest.update(data)
                file.write(data)
        if self.config is not None:
            (path / files.CONFIG).write_bytes(self.config)
        return digest.hexdigest()


def prepared(document: formats.Document, form: formats.Format) -> Prepared:
    """The files of a document, whose data is asked for when they are written."""
    refs = list(document.tensors)
    if not document.ordered:
        refs.sort(key=lambda ref: io.canonical_key(ref.name, ref.dtype))
    start = io.build([(ref.name, ref.dtype, ref.shape) for ref in refs], document.metadata)
    config = None
    if form.folder and document.config is not None:
        config = json.dumps(dict(document.config), indent=2, ensure_ascii=False).encode()
    size = len(start) + sum(ref.nbytes for ref in refs) + len(config or b"")
    return Prepared(document, form, start, tuple(refs), config, size)
