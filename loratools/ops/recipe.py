"""Recipes: everything that a merge was asked for, as a file that repeats it bit for bit.

A recipe is a JSON object, which is YAML too; one written by hand in other YAML is read where PyYAML is installed:

    recipe              1, the version of this format
    version             that of loratools; another one may round otherwise
    inputs              "path" (from the recipe's folder), "weight" (default 1), and the file's "sha256"; for one with a
                        configuration beside it "config_sha256", of that as sorted JSON. Sums may be left out, and
                        are verified where they are there
    method, options     the method's options by the names of the command line
    component_weights, block_weights    lists of one set for all inputs, or of one for each
    weight_for          weights by pattern
    protect             "path" and sums, like an input; protect_energy, protect_strength (null: all)
    boost, layout, dtype, device, arch, drop, allow_nonfinite, full_modules
    base                the path of the model that the inputs were trained on; its content is not verified

Only "inputs" has to be there. A merged file's metadata holds its recipe, with file names for paths.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools import __version__, io, methods
from loratools.errors import MalformedFileError, OptionError, WriteError
from loratools.io import storage
from loratools.io.json_text import brief
from loratools.model import Adapter
from loratools.ops import _merged, files
from loratools.ops._merge_steps import ENERGY, shown_name
from loratools.ops._recipe_fields import checked, number
from loratools.ops._recipe_text import parsed

if TYPE_CHECKING:
    from loratools.ops._request import Request

FORMAT = 1
_SUMS = ("sha256", "config_sha256")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe file says.

    Attributes:
        path: The recipe's own.
        version: That of the loratools that wrote it; empty for one written by hand.
        paths: The inputs.
        protect: The protected adapters.
        sums: Per path, inputs first: the sums that are stated.
        arguments: For ``merge_files``.
    """

    path: str
    version: str
    paths: tuple[str, ...]
    protect: tuple[str, ...]
    sums: tuple[Mapping[str, str], ...]
    arguments: Mapping[str, Any]


def document(asked: Request, described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The recipe of a merge, with the inputs' names for paths.

    Args:
        asked: What was asked for.
        described: The inputs, with the sums of their files.
    """
    steps = asked.steps
    inputs = [
        {**_file(adapter, row["sha256"]), "weight": row["weight"]}
        for adapter, row in zip(asked.adapters, described, strict=True)
    ]
    made: dict[str, Any] = {
        "recipe": FORMAT,
        "version": __version__,
        "inputs": inputs,
        "method": asked.method.name,
        "options": _merged.chosen(asked),
        **asked.said,
        "layout": asked.layout.name,
        # Of several devices of a kind it does not matter which.
        "device": asked.device.partition(":")[0],
        "allow_nonfinite": asked.allow_nonfinite,
        "boost": steps.boost,
    }
    if steps.styles:
        made["protect"] = [_file(style, _merged.sha256(style.path)) for style in steps.styles]
        made["protect_energy"] = steps.energy
        made["protect_strength"] = steps.stated_strength
    return {name: value for name, value in made.items() if _is_said(value)}


def _is_said(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, ())


def _file(adapter: Adapter, sha256: str) -> dict[str, str]:
    described = {"path": shown_name(adapter.path), "sha256": sha256, "config_sha256": _config_sum(adapter)}
    return {name: value for name, value in described.items() if value or name == "path"}


def _config_sum(adapter: Adapter) -> str:
    if not adapter.config:
        return ""
    text = json.dumps(dict(adapter.config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_output(path: files.PathLike, others: Sequence[files.PathLike], *, overwrite: bool) -> None:
    """Refuse a place for a recipe that could not be written, or that something else lies at.

    Raises:
        OptionError: It is the output's or an input's.
        OutputExistsError: It is there, and ``overwrite`` is false.
        WriteError: It is a folder, or its folder does not exist.
    """
    target = os.path.realpath(path)
    if any(storage.real(other) == target for other in others):
        raise OptionError(
            "the recipe would take the place of an input or of the output",
            path=path,
            expected="A name of its own was expected",
            todo="Give --save-recipe another name",
        )
    files.check_output(path, overwrite=overwrite)
    if os.path.isdir(target):
        raise WriteError("this is a folder", path=path, todo="Give --save-recipe a file's name")


class Sources(NamedTuple):
    """The files that a merge reads.

    Attributes:
        paths: The inputs.
        protect: The protected adapters.
        base: The base model, or None.
    """

    paths: Sequence[files.PathLike]
    protect: Sequence[files.PathLike] = ()
    base: files.PathLike | None = None


@contextmanager
def saved(text: str, path: files.PathLike, sources: Sources, *, overwrite: bool) -> Iterator[None]:
    """Write a recipe that takes its name when what is done meanwhile has succeeded.

    Args:
        text: A merged file's recipe.
        path: Where to.
        sources: The files whose names alone the text has.
        overwrite: Whether an existing file may be replaced.
    """
    made = json.loads(text)
    folder = os.path.dirname(os.path.realpath(path))
    for rows, places in (("inputs", sources.paths), ("protect", sources.protect)):
        for row, place in zip(made.get(rows, ()), places, strict=True):
            row["path"] = _seen_from(folder, os.fspath(place))
    if sources.base is not None:
        made["base"] = _seen_from(folder, os.fspath(sources.base))
    with io.atomic_output(path, overwrite) as temporary:
        temporary.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n")
        yield


def _seen_from(folder: str, path: str) -> str:
    """A path that a recipe in a folder can be moved with, where it lies in that folder; else a whole one."""
    whole = storage.real(path)
    inside = whole.startswith(os.path.join(folder, ""))
    return os.path.relpath(whole, folder).replace(os.sep, "/") if inside else whole


def read(path: files.PathLike, *, allow_urls: bool = False) -> Recipe:
    """What a recipe file says, checked but for its inputs' contents.

    Args:
        path: The recipe.
        allow_urls: Whether its inputs may be URLs: a recipe may come from somebody who wants to be called.

    Raises:
        MissingFileError: It is not there.
        MalformedFileError: It is no recipe; the message says where.
        OptionError: It is YAML and PyYAML is not installed; it names an option that the method does not have, or URLs
            that are not allowed.
    """
    place = os.fspath(path)
    said = checked(parsed(place), place)
    folder = _folder_of(place)
    rows = [*said["inputs"], *said.get("protect", ())]
    paths = [storage.joined(folder, row["path"]) for row in rows]
    if not allow_urls:
        _refuse_urls([*paths, *([storage.joined(folder, said["base"])] if said.get("base") else [])], place)
    count = len(said["inputs"])
    method = methods.get(said.get("method", "linear"), path=place)
    names = (
        "block_weights",
        "component_weights",
        "weight_for",
        "boost",
        "layout",
        "dtype",
        "device",
        "arch",
        "drop",
        "full_modules",
    )
    arguments = {name: said[name] for name in (*names, "allow_nonfinite") if said.get(name) is not None}
    if said.get("base"):
        arguments["base"] = storage.joined(folder, said["base"])
    strength = said.get("protect_strength")
    return Recipe(
        path=place,
        version=said.get("version", ""),
        paths=tuple(paths[:count]),
        protect=tuple(paths[count:]),
        sums=tuple({name: row[name] for name in _SUMS if row.get(name)} for row in rows),
        arguments={
            **arguments,
            **_options(method, said.get("options", {}), place),
            "method": method.name,
            "weights": [number(row.get("weight", 1.0), "weight", place) for row in said["inputs"]],
            "protect_energy": number(said.get("protect_energy", ENERGY), "protect_energy", place),
            "protect_strength": None if strength is None else number(strength, "protect_strength", place),
        },
    )


def _folder_of(place: str) -> str:
    """Where the paths in a recipe are seen from."""
    return place.rpartition("/")[0] if storage.is_url(place) else os.path.dirname(os.path.realpath(place))


def _refuse_urls(paths: Sequence[str], place: str) -> None:
    found = [path for path in dict.fromkeys(paths) if storage.is_url(path)]
    if found:
        raise OptionError(
            f"the recipe has {len(found)} URLs for inputs",
            path=place,
            keys=found,
            expected="The network is reached for no URL that a file names, unless that is said",
            todo="Look at them, and if you trust them, pass --allow-urls (allow_urls=True)",
        )


def _options(method: methods.Method, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A method's options by field."""
    known = {option.name: option for option in method.options}
    foreign = [name for name in given if name not in known]
    if foreign:
        raise OptionError(
            f"{method.name} has no option {brief(foreign[0])}",
            path=path,
            expected=f"Its options are: {', '.join(known) or 'none'}",
            todo="Take the option out of the recipe, or choose another method",
        )
    found = {}
    for name, value in given.items():
        textual = isinstance(known[name].default, str) or not isinstance(value, str)
        found[known[name].field] = value if textual else number(value, name, path)
    return found


def verify(recipe: Recipe) -> list[str]:
    """Refuse inputs that are not what they were when the recipe was written.

    Returns:
        The inputs of which the recipe states no sum.

    Raises:
        MalformedFileError: A sum differs; all such inputs are named.
        LoraError: An input cannot be read.
    """
    changed: list[str] = []
    unverified: list[str] = []
    for path, stated in zip((*recipe.paths, *recipe.protect), recipe.sums, strict=True):
        adapter = files.load(path, arch=recipe.arguments.get("arch"))
        found = {"sha256": _merged.sha256(adapter.path), "config_sha256": _config_sum(adapter)}
        changed += [f"{path}: {name}" for name in _SUMS if name in stated and stated[name] != found[name]]
        if "sha256" not in stated:
            unverified.append(os.path.basename(path))
    if changed:
        raise MalformedFileError(
            f"{len(changed)} sums of the inputs are not what the recipe states",
            path=recipe.path,
            keys=changed,
            expected="The very files that the recipe was made with were expected",
            todo="Find them, or take the sums out of the recipe to merge what is there",
        )
    return unverified
