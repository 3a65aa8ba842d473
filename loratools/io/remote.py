"""Files at URLs of all kinds but the hub's, through fsspec: S3, Google's and Azure's storage, web servers.

fsspec finds the package for a kind of URL by itself, with its settings: ``AWS_ENDPOINT_URL`` and the like, and
``~/.config/fsspec``. Retries are that package's. https://filesystem-spec.readthedocs.io
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loratools.errors import LoraError, MissingFileError, OptionError, ReadError, WriteError
from loratools.io.storage import missing_package
from loratools.io.stores import State

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What packages fsspec itself names for URLs that it knows and lacks the package of (as of fsspec 2026).
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}
_WEB = ("http://", "https://")
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
_LISTED = 20  # seconds that a listing is good for: a folder's files are asked for one after the other
_REFUSED = frozenset({"NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError"})


class Files:
    """The files that fsspec reaches."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, State], str] = {}
        self._folder = ""
        self._turn = threading.Lock()

    def state(self, url: str) -> State | None:
        """What there is; see :class:`loratools.io.stores.Store`.

        Raises:
            ReadError: The server refuses, or cannot be reached.
            OptionError: A package is missing, or there is no such kind of URL.
        """
        with _errors(url):
            system, path = _system(url)
            try:
                said = system.info(path)
            except FileNotFoundError:
                return None
        web = url.startswith(_WEB)
        told = said.get("size")
        count = -1 if told is None else int(told)
        folder = said.get("type") == "directory"
        label = next((str(said[name]) for name in _TAGS if said.get(name)), "")
        return State(
            0 if folder else count, folder, label, count >= 0 and (not web or bool(said.get("partial")))
        )

    def names(self, url: str) -> list[str]:
        """The names in a folder.

        Raises:
            LoraError: As for :meth:`state`; web servers list no folders.
        """
        _refuse_listing(url)
        with _errors(url):
            system, path = _system(url)
            found = [str(name).rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)]
        return [name for name in found if name]

    def tree(self, url: str) -> Mapping[str, int]:
        """All files below a folder.

        Raises:
            LoraError: As for :meth:`names`.
        """
        _refuse_listing(url)
        with _errors(url):
            system, path = _system(url)
            found: dict[str, dict[str, Any]] = system.find(path, detail=True)
        above = path.strip("/") + "/"
        return {
            name.lstrip("/").removeprefix(above): int(said.get("size") or 0) for name, said in found.items()
        }

    def read(self, url: str, start: int, stop: int) -> bytes:
        """A range of a file.

        Raises:
            LoraError: As for :meth:`state`.
        """
        if start >= stop:
            return b""
        with _errors(url):
            system, path = _system(url)
            data: bytes = system.cat_file(path, start=start, end=stop)
        return data

    def fetched(self, url: str) -> str:
        """A whole copy in a temporary folder of this process.

        Raises:
            LoraError: As for :meth:`state`, or there is no file.
            WriteError: There is no room for it.
        """
        found = self.state(url)
        if found is None or found.folder:
            raise MissingFileError("no such file", path=url, todo="Check the URL")
        with self._turn:
            copy = self._copies.get((url, found))
            if copy is None or not os.path.isfile(copy):  # temporary folders are swept
                copy = self._copies[url, found] = self._fetch(url, found)
        return copy

    def pinned(self, url: str) -> str:
        """The URL itself: these stores have no names for states."""
        return url

    def _fetch(self, url: str, found: State) -> str:
        import tempfile

        from loratools.io.staging import check_room

        if not os.path.isdir(self._folder):
            self._folder = tempfile.mkdtemp(prefix="loratools-")
            _remove_at_exit(self._folder)
        check_room(self._folder, found.size, url)
        place = os.path.join(self._folder, f"{len(self._copies)}-{os.path.basename(url)[-100:]}")
        with _errors(url):
            system, path = _system(url)
            system.get_file(path, place)
        return place


@lru_cache(maxsize=1)
def files() -> Files:
    """The store of this process."""
    return Files()


def upload(path: str, url: str) -> None:
    """Have a file's content at a URL, whole or not at all.

    Raises:
        WriteError: The store refuses.
        OptionError: A package is missing, or nothing can be written to such a URL.
    """
    try:
        with _errors(url):
            system, place = _system(url)
            system.put_file(path, place)
            system.invalidate_cache()
    except ReadError as error:
        raise WriteError(error.problem, path=url, expected=error.expected, todo=error.todo) from error


def remove(url: str) -> None:
    """Remove a file at a URL.

    Raises:
        LoraError: The store refuses.
    """
    with _errors(url):
        system, path = _system(url)
        system.rm_file(path)


def afresh(url: str) -> None:
    """Forget what was listed: others may have written meanwhile.

    Raises:
        OptionError: A package is missing, or there is no such kind of URL.
    """
    with _errors(url):
        _system(url)[0].invalidate_cache()


def _system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the URL's path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise missing_package(url, "fsspec", "remote") from error
    scheme = url.partition("://")[0].rpartition("::")[2]
    try:
        system, path = url_to_fs(url, use_listings_cache=True, listings_expiry_time=_LISTED)
    except ImportError as error:
        raise missing_package(url, _PACKAGES.get(scheme, f"for {scheme}:// ({error})"), "") from error
    except ValueError as error:
        raise OptionError(
            f"no URL that can be used: {error}",
            path=url,
            expected="A path was expected, hf://ORG/REPO, or a URL that fsspec knows (s3://, gs://, https://, …)",
            todo="Check it; a file whose name holds '://' is given as ./NAME",
        ) from error
    return system, str(path)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn what packages raise, each its own, into errors that say what to do."""
    try:
        yield
    except LoraError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            "nothing is there", path=url, expected="A file or folder was expected", todo="Check the URL"
        ) from error
    except Exception as error:  # botocore's, aiohttp's, gcsfs's: they have no base in common
        raise _refused(url, error) from error


def _refused(url: str, error: Exception) -> ReadError:
    status = getattr(error, "status", None)
    refused = isinstance(error, PermissionError) or type(error).__name__ in _REFUSED or status in (401, 403)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if refused:
        return ReadError(
            f"no permission: {reason}",
            path=url,
            expected="The store's own settings say who one is (for S3: AWS_ACCESS_KEY_ID or ~/.aws)",
            todo="Check them, and that the URL is meant",
        )
    return ReadError(
        f"the store does not answer as it should: {reason}",
        path=url,
        todo="Check the URL, the network and the store's settings (for S3: AWS_ENDPOINT_URL), and try again",
    )


def _refuse_listing(url: str) -> None:
    if url.startswith(_WEB):
        raise ReadError(
            "web servers list no folders",
            path=url,
            expected="The URL of a file was expected",
            todo="Name the file itself",
        )


def _remove_at_exit(folder: str) -> None:
    import atexit
    import shutil

    owner = os.getpid()  # a forked process ends without taking the copies along
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
