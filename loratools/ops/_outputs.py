"""Whether an output can be written where and as it is asked for, said before any work is done for it."""

from __future__ import annotations

import ntpath
import os

from loratools import formats
from loratools.errors import LayoutError, OptionError, OutputExistsError, WriteError
from loratools.io import names, storage
from loratools.io.uploading import goal
from loratools.model import Layout

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES, ".npz", ".gguf")

_WINDOWS = os.name == "nt"
_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))

PathLike = str | os.PathLike[str]


def layout_of(form: formats.Format, container: str) -> Layout:
    """A layout as it is written anew, in its usual generation."""
    variant = form.pickled if container == "pickle" else "peft-keys" if form.name == "diffusers" else ""
    return Layout(form.name, variant, container)


def check_output(path: PathLike, *, overwrite: bool) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Raises:
        OutputExistsError: It is there, and ``overwrite`` is false.
        WriteError: Its folder does not exist, or the system can give no file its name.
    """
    target = os.fspath(path)
    check_system(target)
    if os.path.isdir(target):
        if os.listdir(target) and not overwrite:
            raise OutputExistsError(
                "the output is a folder and holds files",
                path=target,
                todo="Give a file's name, or another folder's; --overwrite replaces files in a folder",
            )
    elif os.path.exists(target) and not overwrite:
        raise OutputExistsError(
            "the output exists already", path=target, todo="Pass --overwrite to replace it"
        )
    folder = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(folder):
        raise WriteError(
            f"the folder {folder} does not exist", path=target, todo="Create it, or choose another name"
        )


def check_system(target: str) -> None:
    """Refuse a name under which Windows would write to a device, a stream of another file, or another name.

    Raises:
        WriteError: It is one.
    """
    if not _WINDOWS or "://" in target:
        return
    why = names.refusal(ntpath.basename(target.rstrip("\\/")))
    if why:
        raise WriteError(
            f"Windows can give no file this name: {why}",
            path=target,
            todo=f"Choose another name, such as {names.portable(ntpath.basename(target))}",
        )


def within(path: PathLike, folder: PathLike) -> bool:
    """Whether a path is a folder or lies in it: links are followed, and case counts where it does for the system.

    What is made on this machine to be uploaded lies where it goes to.
    """
    place, outside = goal(path), goal(folder)
    if storage.is_url(place) or storage.is_url(outside):
        return f"{place.rstrip('/')}/".startswith(f"{outside.rstrip('/')}/")
    inner, outer = (os.path.normcase(os.path.realpath(each)) for each in (path, folder))
    try:
        return os.path.commonpath([inner, outer]) == outer
    except ValueError:  # on two drives
        return False


def check_name(path: PathLike, layout: str) -> str:
    """The container that an output's name means; a name that does not go with a layout is refused.

    Raises:
        OptionError: A file's name where the layout is a folder, or the other way round.
        LayoutError: The name of another container than safetensors.
    """
    target, form = os.fspath(path), formats.get(layout)
    suffix = os.path.splitext(target)[1].lower()
    if form.folder and suffix in SUFFIXES:
        raise OptionError(
            f"the {form.title} layout is a folder",
            path=target,
            expected=f"A name was expected that does not end in {suffix}",
            todo="Give a folder's name, or another --to",
        )
    if form.container != "safetensors":
        return _of_one_kind(target, suffix, form)
    if not form.folder and (os.path.isdir(target) or target.endswith(_SEPARATORS)):
        raise OptionError(
            "the output is a folder" if os.path.isdir(target) else "the output has a folder's name",
            path=target,
            expected=f"A file's name was expected: the {form.title} layout is a file",
            todo="Give a name that ends in .safetensors, or another --to",
        )
    if suffix in PICKLES and form.pickled:
        return "pickle"
    if suffix in SUFFIXES and suffix != ".safetensors":
        raise LayoutError(
            f"a {suffix} file is not written in the {form.title} layout",
            path=target,
            todo="Give a name that ends in .safetensors",
        )
    return "safetensors"


def _of_one_kind(target: str, suffix: str, form: formats.Format) -> str:
    """The container of a layout that has one of its own."""
    if (
        os.path.isdir(target)
        or target.endswith(_SEPARATORS)
        or (suffix in SUFFIXES and suffix != f".{form.container}")
    ):
        raise LayoutError(
            f"the {form.title} layout is not written under such a name",
            path=target,
            todo=f"Give a name that ends in .{form.container}",
        )
    return form.container
