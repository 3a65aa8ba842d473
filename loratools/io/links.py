"""Where a link in a folder may lead: within the folder, or to the blobs of the download's cache that the folder is of.

A model's or an adapter's folder comes from others, and what is read from it may be published again: a link in it to
a file of the user's would carry that file along. A path that the user gives may be a link to anywhere.

Source: huggingface_hub's cache, where ``REPO/snapshots/COMMIT/FILE`` links to ``REPO/blobs/HASH``, and that may link to
the cache's own ``blobs/XX/HASH`` (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loratools.errors import MalformedFileError
from loratools.io import storage

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def refuse_leaving(path: str, folder: str) -> None:
    """Refuse a file or folder that lies elsewhere than its name says.

    Args:
        path: Of something in the folder, at any depth; need not be there.
        folder: The whole model's, or adapter's.

    Raises:
        MalformedFileError: A link on the way leads out of the folder.
    """
    if storage.is_url(folder):
        return
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home) or any(real.is_relative_to(blobs) for blobs in _blobs(home)):
        return
    raise MalformedFileError(
        f"a link leads to {real}, outside its own folder",
        path=path,
        expected=f"A file in {folder}, or in the blobs of the download's cache that it belongs to, was expected",
        todo="If you trust the link, put a copy of the file, or a hard link to it, in its place",
    )


def _blobs(home: Path) -> Iterator[Path]:
    """The folders of blobs that a snapshot's files are links to: the repository's, and the one that all share."""
    for place in (home, *home.parents):
        if place.parent.name == _SNAPSHOTS:
            repository = place.parent.parent
            yield repository / _BLOBS
            yield repository.parent / _BLOBS
