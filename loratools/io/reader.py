"""Open a file of tensors, whatever it is called: the content decides what it is."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from loratools.errors import LoraError, MalformedFileError, MissingFileError, ReadError
from loratools.io import header, storage, unchanged
from loratools.io.mapped import FileMap, MappedSource, TensorFile
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    from loratools.io.ranged import RemoteFile

__all__ = ["TensorFile", "open_tensors", "sniff"]

_HEAD = 4096
# A header length above this is not a length but some other file's text: eight letters are at least 2**61.
_PLAUSIBLE = 2**40
_GGUF = b"GGUF"
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")


class _Stranger(NamedTuple):
    """A kind of file that is recognised in order to say why it is not read."""

    magic: bytes
    what: str
    todo: str
    at: int = 0


_CONVERT = "Convert it to safetensors first"
_UNPACK = "Unpack it, and give the file inside"
_STRANGERS = (
    _Stranger(
        b"version https://git-lfs",
        "a git-lfs pointer, not the file it stands for",
        "Fetch the file with 'git lfs pull', or download it from its page",
    ),
    _Stranger(b"ggjt", "a GGML file, which cannot be read yet", _CONVERT),
    _Stranger(b"\x89HDF", "an HDF5 file (Keras), which cannot be read", _CONVERT),
    _Stranger(b"\x93NUMPY", "a single numpy array without a name", "Save it with numpy.savez under its key"),
    _Stranger(b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    _Stranger(b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    _Stranger(b"\x1f\x8b", "a gzip archive", _UNPACK),
    _Stranger(b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    _Stranger(b"\xfd7zXZ", "an xz archive", _UNPACK),
    _Stranger(b"BZh", "a bzip2 archive", _UNPACK),
    _Stranger(b"\x89PNG", "a PNG image", "Give the adapter's own file"),
    _Stranger(b"\xff\xd8\xff", "a JPEG image", "Give the adapter's own file"),
    _Stranger(
        b"ustar",
        "a tar archive (or a file of a torch older than 0.1.10)",
        "Unpack it; or load it in an old torch and save it again",
        at=257,
    ),
)


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file of tensors: safetensors, a pickle of torch.save, numpy's npz or GGUF; data is read on demand.

    Raises:
        MissingFileError: There is no such file.
        UnsafePickleError: A pickle that would have to run code.
        MalformedFileError: Damaged, or no container of tensors that we read; says what it is instead.
        LoraError: It cannot be opened (no permission).
    """
    name = os.fspath(path)
    if storage.is_url(name):
        return _open_url(storage.pinned(name))
    return _open(name)


def _open(name: str) -> TensorFile:
    """Open a file on this machine."""
    container, size = _identify(name)
    try:
        if container == "safetensors":
            return _open_safetensors(name, size)
        if container == "npz":
            from loratools.io.npz import read_npz

            return read_npz(name, size)
        if container == "gguf":
            from loratools.io.gguf_files import read_gguf

            return read_gguf(name, size)
        from loratools.io.pickles import read_pickle

        return read_pickle(name, size)
    except LoraError:
        raise
    except OSError as error:
        _cannot_read(name, error)


def sniff(path: str | os.PathLike[str]) -> str:
    """The container of a file, by its content: "safetensors", "pickle", "npz" or "gguf".

    Raises:
        MissingFileError: There is no such file.
        MalformedFileError: It is none of these; says what it is instead.
        LoraError: It cannot be opened (no permission).
    """
    name = os.fspath(path)
    return _open_url(storage.pinned(name)).container if storage.is_url(name) else _identify(name)[0]


def _open_url(url: str) -> TensorFile:
    """Open a file elsewhere: safetensors by parts, all others whole."""
    said = storage.state(url)
    if said.folder:
        _refuse_folder(url)
    unchanged.note_elsewhere(url, said.whole_tag)
    if said.ranged:
        from loratools.io.ranged import RemoteFile

        file = RemoteFile(url, said)
        head = file.head[:_HEAD]
        if not head.startswith(_ZIPS) and _container(bytes(head), file.size, url) == "safetensors":
            found = header.parse(bytes(file.header()), file.size, url)
            start = found.data_start
            file.plan((start + begin, start + end) for _, _, begin, end in found.entries.values())
            return _named(file, found, file.size)
    opened = _open(storage.local(url))
    opened.path = url
    return opened


def _open_safetensors(path: str, size: int) -> TensorFile:
    mapped = FileMap(path)
    try:
        with mapped.view(0, size) as data:
            found = header.parse(data, size, path)
    except BaseException:
        mapped.close()
        raise
    return _named(mapped, found, size)


def _named(file: FileMap | RemoteFile, found: header.Header, size: int) -> TensorFile:
    """A safetensors file's tensors by name."""
    entries, metadata, start = found
    tensors = {
        name: TensorRef(name, shape, dtype, MappedSource(file, start + begin, start + end))
        for name, (dtype, shape, begin, end) in entries.items()
    }
    return TensorFile(file.path, "safetensors", tensors, metadata, size, on_close=file.close)


def _identify(path: str) -> tuple[str, int]:
    """The container and the size in bytes."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            _refuse_folder(path)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedFileError("not a regular file", path=path, todo="Give a file on disk")
        unchanged.note(path, status)
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except (FileNotFoundError, NotADirectoryError):
        _missing(path)
    except (OSError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        _cannot_read(path, error)
    return _container(head, status.st_size, path), status.st_size


def _container(head: bytes, size: int, path: str) -> str:
    if head.startswith(_ZIPS):
        return _zip_container(path)
    # JSON text could have its ninth byte right, but its first eight are no length. A header's length may begin
    # like a pickle (640 is 80 02), so this comes before.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _PLAUSIBLE:
        return "safetensors"
    if head.startswith(_GGUF):
        return "gguf"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    for stranger in _STRANGERS:
        if head.startswith(stranger.magic, stranger.at):
            _refuse(stranger.what, stranger.todo, path)
    return _unrecognised(head, size, path)


def _zip_container(path: str) -> str:
    from loratools.io.archive import open_archive

    with open_archive(path) as archive:
        names = archive.namelist()
    depths = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in depths:
        _refuse(
            "a TorchScript archive, which holds a program rather than tensors",
            "Save the module's state_dict as safetensors",
            path,
        )
    if "data.pkl" in depths:
        return "pickle"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    inside = f"a zip archive of {len(names)} files, none of them torch's or numpy's"
    raise MalformedFileError(inside, path=path, keys=names, todo=_UNPACK)


def _unrecognised(head: bytes, size: int, path: str) -> NoReturn:
    if size < 9 or _header_like(head, size):
        header.parse(head, size, path)  # says in which way it falls short of a safetensors file
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        _refuse(
            "a saved web page (HTML) instead of the download",
            "Download the file itself; sites send a page instead where one has to log in first",
            path,
        )
    if text.startswith(("{", "[")):
        _refuse("JSON text, not tensors", "Give the file of weights that lies beside it", path)
    if min(head) >= 9:  # no control characters below the tabulator
        _refuse("plain text, not tensors", "Give the adapter's own file", path)
    _refuse(f"no known container (it begins with {head[:8].hex(' ')})", "Check the download", path)


def _header_like(head: bytes, size: int) -> bool:
    """Whether the first eight bytes could be the length of a header that this file holds."""
    return 0 < int.from_bytes(head[:8], "little") <= size - 8


def _refuse_folder(path: str) -> NoReturn:
    raise MalformedFileError(
        "a folder, not a file", path=path, expected="One file is read here", todo="Give a file in it"
    )


def _refuse(what: str, todo: str, path: str) -> NoReturn:
    raise MalformedFileError(
        what,
        path=path,
        expected="Safetensors, a pickle of torch.save, numpy's npz or GGUF were expected",
        todo=todo,
    )


def _missing(path: str) -> NoReturn:
    from difflib import get_close_matches

    folder, name = os.path.split(path)
    wanted = "A file of tensors was expected"
    try:
        beside = os.listdir(folder or ".")
    except OSError:
        raise MissingFileError(
            "no such file; its folder does not exist either",
            path=path,
            expected=wanted,
            todo="Check the path",
        ) from None
    raise MissingFileError(
        "no such file",
        path=path,
        candidates=get_close_matches(name, beside),
        expected=wanted,
        todo="Check the path",
    ) from None


def _cannot_read(path: str, error: Exception) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise ReadError(
        f"cannot be read: {reason}", path=path, todo="Check the path and its permissions"
    ) from error
