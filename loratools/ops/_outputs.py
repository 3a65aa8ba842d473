"""Whether an output can be written where and as it is asked for, said before any work is done for it."""

from __future__ import annotations

import os

from loratools import formats
from loratools.errors import LayoutError, OptionError, OutputExistsError, WriteError
from loratools.model import Layout

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES, ".npz", ".gguf")

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
        WriteError: Its folder does not exist.
    """
    target = os.fspath(path)
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
