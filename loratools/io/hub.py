"""Files in repositories of a model hub, through huggingface_hub: ``hf://ORG/REPO[@REVISION][/PATH]``.

The library's settings hold: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``. A revision is resolved to a
commit once in a process, and with it come the names and sizes of all files, so that a repository costs one request
and all that is read is of one state. What lies whole in the library's cache is read there.
https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

from loratools.errors import LoraError, MissingFileError, OptionError, ReadError
from loratools.io.storage import HUB, missing_package
from loratools.io.stores import State

# A revision may have slashes where it is a pull request's or a conversion's; others are written with %2F.
_FORM = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?")
_OTHERS = ("datasets/", "spaces/", "buckets/")
_SHA256 = 64  # digits
_TIMEOUT = 30  # seconds without a byte; the library tries again


class Place(NamedTuple):
    """What a URL says.

    Attributes:
        repo: "ORG/NAME".
        revision: A branch, tag, or commit; empty where none is said.
        path: Of a file or folder in the repository; empty for the repository itself.
    """

    repo: str
    revision: str
    path: str


class Repository(NamedTuple):
    """A repository at one commit.

    Attributes:
        commit: Its hash.
        files: By path: the size in bytes, and the hub's hash of the content.
    """

    commit: str
    files: Mapping[str, tuple[int, str]]


class Hub:
    """The repositories of the hub that the library is set to."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Repository] = {}
        self._turn = threading.Lock()

    def state(self, url: str) -> State | None:
        """What there is; see :class:`loratools.io.stores.Store`.

        Raises:
            MissingFileError: There is no such repository or revision.
            ReadError: The hub refuses, or cannot be reached.
            OptionError: The package is missing, or this is no URL of a model's repository.
        """
        place, repository = self._at(url)
        if place.path in repository.files:
            size, digest = repository.files[place.path]
            # Of large files the hub tells the content's own hash, of small ones git's of 40 digits.
            return State(size, False, digest, sha256=digest if len(digest) == _SHA256 else "")
        inside = place.path + "/" if place.path else ""
        return State(0, True) if any(name.startswith(inside) for name in repository.files) else None

    def names(self, url: str) -> list[str]:
        """The names in a folder.

        Raises:
            LoraError: As for :meth:`state`.
        """
        return list(dict.fromkeys(name.partition("/")[0] for name in self.tree(url)))

    def tree(self, url: str) -> Mapping[str, int]:
        """All files below a folder.

        Raises:
            LoraError: As for :meth:`state`.
        """
        place, repository = self._at(url)
        inside = place.path + "/" if place.path else ""
        return {
            name.removeprefix(inside): size
            for name, (size, _) in repository.files.items()
            if name.startswith(inside)
        }

    def read(self, url: str, start: int, stop: int) -> bytes:
        """A range of a file: from the cache where the file lies there, else by a request for the range.

        Raises:
            LoraError: As for :meth:`state`.
        """
        place, repository = self._at(url)
        if start >= stop:
            return b""
        kept = _kept(place.repo, place.path, repository.commit)
        if kept:
            with open(kept, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        return _range(url, place, repository.commit, start, stop)

    def fetched(self, url: str) -> str:
        """A file in the library's cache, downloaded where it is not there yet.

        Raises:
            LoraError: As for :meth:`state`.
        """
        place, repository = self._at(url)
        with _errors(url, place):
            from huggingface_hub import hf_hub_download

            return str(hf_hub_download(place.repo, place.path, revision=repository.commit))

    def pinned(self, url: str) -> str:
        """The URL with the commit that its revision stands for now.

        Raises:
            LoraError: As for :meth:`state`.
        """
        place, repository = self._at(url)
        return f"{HUB}{place.repo}@{repository.commit}" + (f"/{place.path}" if place.path else "")

    def _at(self, url: str) -> tuple[Place, Repository]:
        place = parse(url)
        with self._turn:
            found = self._known.get((place.repo, place.revision))
            if found is None:
                found = self._known[place.repo, place.revision] = _ask(url, place)
                self._known[place.repo, found.commit] = found
        return place, found


@lru_cache(maxsize=1)
def hub() -> Hub:
    """The store of this process."""
    return Hub()


def parse(url: str) -> Place:
    """What a URL says.

    Raises:
        OptionError: It has another form, or leaves its repository.
    """
    found = _FORM.fullmatch(url)
    if found is None or url.removeprefix(HUB).startswith(_OTHERS):
        raise OptionError(
            "no URL of a model's repository",
            path=url,
            expected="hf://ORG/REPO, hf://ORG/REPO@REVISION or hf://ORG/REPO/PATH was expected",
            todo="Correct it; a slash in a revision is written %2F",
        )
    path = (found[3] or "").strip("/")
    if any(name in (".", "..", "") for name in path.split("/")) and path:
        raise OptionError("the path leaves its repository, or has an empty name", path=url, todo="Correct it")
    return Place(found[1], unquote(found[2] or ""), path)


def _ask(url: str, place: Place) -> Repository:
    """Which commit a revision is, and what it holds."""
    with _errors(url, place):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return _cached(url, place)
        said = HfApi().model_info(
            place.repo, revision=place.revision or None, files_metadata=True, timeout=_TIMEOUT
        )
    files = {
        each.rfilename: (each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id or "")
        for each in said.siblings or ()
    }
    return Repository(said.sha or "", files)


def _cached(url: str, place: Place) -> Repository:
    """What the library's cache holds of a repository."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    wanted = place.revision or "main"
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        repositories = frozenset()
    for repository in repositories:
        if repository.repo_id != place.repo or repository.repo_type != "model":
            continue
        for revision in repository.revisions:
            if wanted == revision.commit_hash or wanted in revision.refs:
                files = {
                    each.file_path.relative_to(revision.snapshot_path).as_posix(): (
                        each.size_on_disk,
                        each.blob_path.name,
                    )
                    for each in revision.files
                }
                return Repository(revision.commit_hash, files)
    raise MissingFileError(
        f"revision {wanted!r} of {place.repo} is not in the cache, and offline mode is on (HF_HUB_OFFLINE)",
        path=url,
        expected="Offline, what was downloaded before is read, and nothing else",
        todo=f"Run 'hf download {place.repo}' while online, or unset HF_HUB_OFFLINE",
    )


def _kept(repo: str, path: str, commit: str) -> str:
    """The path of a file in the library's cache; empty where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, path, revision=commit)
    return found if isinstance(found, str) else ""


def _range(url: str, place: Place, commit: str, start: int, stop: int) -> bytes:
    with _errors(url, place):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        answer = http_backoff(
            "GET",
            hf_hub_url(place.repo, place.path, revision=commit),
            headers={**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"},
            timeout=_TIMEOUT,
        )
        hf_raise_for_status(answer)
        return bytes(answer.content)


@contextmanager
def _errors(url: str, place: Place) -> Iterator[None]:
    """Turn what the library raises into errors that say what to do."""
    try:
        import huggingface_hub  # noqa: F401 - its absence is told before its errors
    except ImportError as error:
        raise missing_package(url, "huggingface_hub", "hub") from error
    try:
        yield
    except LoraError:
        raise
    except Exception as error:  # its own, and those of the HTTP library under it, which it has changed before
        raise _refused(url, place, error) from error


def _refused(url: str, place: Place, error: Exception) -> LoraError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{quote(place.repo)}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    revision = place.revision or "main"
    match error:
        case errors.GatedRepoError():
            problem = "the repository is gated: its files are for those who accepted its terms"
            todo = f"Accept them at {page}, then run 'hf auth login' or set HF_TOKEN"
            return ReadError(problem, path=url, todo=todo)
        case errors.RepositoryNotFoundError():
            return MissingFileError(
                f"no repository {place.repo} that may be read",
                path=url,
                expected="A public repository was expected, or a token that may read a private one",
                todo="Check the name; for a private one run 'hf auth login' or set HF_TOKEN",
            )
        case errors.RevisionNotFoundError():
            todo = f"Look the branches, tags and commits up at {page}"
            return MissingFileError(f"no revision {revision!r} in {place.repo}", path=url, todo=todo)
        case errors.EntryNotFoundError():
            return MissingFileError("no such file in the repository", path=url, todo=f"Look it up at {page}")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            todo = f"Run 'hf download {place.repo} {place.path}' while online, or unset HF_HUB_OFFLINE"
            return MissingFileError(
                "not in the cache, and offline mode is on (HF_HUB_OFFLINE)", path=url, todo=todo
            )
        case errors.HFValidationError():
            return OptionError(f"no name of a repository: {reason}", path=url, todo="Check the URL")
        case errors.HfHubHTTPError() if getattr(error.response, "status_code", 0) in (401, 403):
            todo = "Run 'hf auth login', or set HF_TOKEN to a token that may read it"
            return ReadError(f"no permission: {reason}", path=url, todo=todo)
    return ReadError(
        f"the hub at {constants.ENDPOINT} does not answer as it should: {reason}",
        path=url,
        expected="What lies in the cache is read without it where HF_HUB_OFFLINE=1 is set",
        todo="Check the network and HF_ENDPOINT, then try again",
    )
