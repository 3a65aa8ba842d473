"""What is fuzzed: for each reader how bytes reach it, what they begin with, and how they are changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple
from zlib import crc32

from tests import factories
from tests.fuzz import mutators, seeds
from tests.fuzz.mutators import Mutator, Scramble

Run = Callable[[bytes], object]


class Target(NamedTuple):
    """One reader.

    Attributes:
        open: Makes ready what it needs in an empty folder, and gives the function that takes the bytes.
        seeds: Makes the first inputs.
        mutate: Changes one.
    """

    open: Callable[[Path], Run]
    seeds: Callable[[], list[bytes]]
    mutate: Mutator


def _header(_: Path) -> Run:
    from loratools.io import header

    return lambda data: header.parse(data, len(data), "x.safetensors")


def _file(name: str) -> Callable[[Path], Run]:
    """A file of tensors: opened, every tensor's data made, and the places of the data found."""

    def ready(folder: Path) -> Run:
        from loratools.io.base import keys_of
        from loratools.io.reader import open_tensors

        path = folder / name

        def run(data: bytes) -> None:
            path.write_bytes(data)
            with open_tensors(path) as opened:
                for ref in opened.tensors.values():
                    ref.raw()
            keys_of(path)

        return run

    return ready


def _adapter(folder: Path) -> Run:
    """An adapter from beginning to end: detection, what ``info`` says without norms, doctor's checks of headers."""
    path = folder / "style.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        _examined(path)

    _examined_once(folder)
    return run


def _examined(path: Path) -> None:
    from loratools.errors import LoraError
    from loratools.ops import doctor, inspect

    try:
        inspect.info(path, norms=False)
    finally:
        with suppress(LoraError):  # what it says of a file that cannot be read is what info says
            doctor.doctor(path, values=False)


def _examined_once(folder: Path) -> None:
    """Import all that a first examination imports, so that it is no part of any input's time."""
    _examined(factories.kohya(folder / "first.safetensors").path)
    (folder / "first.safetensors").unlink()


def _configuration(make: Callable[[Path], factories.Made]) -> Callable[[Path], Run]:
    """The adapter_config.json beside weights that are sound."""

    def ready(folder: Path) -> Run:
        _examined(make(folder).path)
        path = folder / "adapter_config.json"

        def run(data: bytes) -> None:
            path.write_bytes(data)
            _examined(folder)

        return run

    return ready


def _model(name: str, container: str = "one.safetensors") -> Callable[[Path], Run]:
    """A JSON file of a model's folder, beside weights that are sound; an index is given by itself."""

    def ready(folder: Path) -> Run:
        from loratools.io.base import config_of, keys_of

        path = folder / name
        given = path if ".index." in name else folder
        path.parent.mkdir(exist_ok=True)
        (path.parent / container).write_bytes(seeds.shard())

        def run(data: bytes) -> None:
            path.write_bytes(data)
            try:
                keys_of(given)
            finally:
                config_of(path.parent)

        return run

    return ready


def _recipe(name: str) -> Callable[[Path], Run]:
    def ready(folder: Path) -> Run:
        from loratools.ops import recipe

        path = folder / name

        def run(data: bytes) -> None:
            path.write_bytes(data)
            recipe.read(path)

        return run

    return ready


def _journal(folder: Path) -> Run:
    from loratools.io import _journal_file

    path = folder / "journal"
    own = _journal_file.Identity("bake", {"a": "1"}, {"b": [1]})

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = _journal_file.read(path)
        if found.identity is not None:
            own.differences(found.identity)

    return run


def _pack_index(folder: Path) -> Run:
    """The index of a pack, whose files are sound: what it describes is unpacked, but for the writing."""
    from loratools.ops.inspect import info
    from loratools.ops.unpack import unpack

    seeds.pack(folder / "pack")
    path = folder / "pack" / "index.json"
    unpack(folder / "pack", folder / "out", dry_run=True)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        info(path.parent)
        unpack(path.parent, folder / "out", dry_run=True)

    return run


def _pack_journal(folder: Path) -> Run:
    """The journal of a pack that was interrupted, without its checksums: another run goes on with it."""
    from loratools.io.work_folder import clean, place_of
    from loratools.ops.pack import pack

    library, output = folder / "library", folder / "pack"
    seeds.library(library)
    pack([library], output, threads=1)

    def run(data: bytes) -> None:
        work = place_of(output)
        work.mkdir()
        (output / "index.json").unlink()
        output.rename(work / "pack")
        lines = data.replace(seeds.LIBRARY, bytes(library)).split(b"\n")
        (work / "journal").write_bytes(b"".join(b"%08x %s\n" % (crc32(line), line) for line in lines))
        try:
            pack([library], output, resume=True, threads=1)
        finally:
            if not output.is_dir():  # refused: then there is no pack to go on with for the next
                clean(output)
                pack([library], output, threads=1)

    return run


def _one_line(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """One of several lines of JSON, changed."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = mutators.of_json(lines[at], random, scramble).replace(b"\n", b" ")
    return b"\n".join(lines)


def _lines(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """A journal whose lines are changed, and their checksums true again."""
    if random.random() < 0.3:
        return scramble(data)
    lines = [line.partition(b" ")[2] for line in data.split(b"\n") if line]
    if not lines:
        return scramble(data)
    at = random.randrange(len(lines))
    lines[at] = mutators.of_json(lines[at], random, scramble).replace(b"\n", b" ")
    return b"".join(b"%08x %s\n" % (crc32(line), line) for line in lines)


def _pickle(_: Path) -> Run:
    from loratools.io.opcodes import scan

    return lambda data: scan(data, "x.pkl")


def _pattern(_: Path) -> Run:
    import re

    from loratools.formats._patterns import pattern

    def run(data: bytes) -> None:
        text, _, name = data.decode("utf-8", "replace").partition("\n")
        for tail in (False, True):
            with suppress(re.error):  # what every reader of patterns expects, and takes for a plain name
                pattern(text, tail=tail).matches(name[:200])

    return run


def _url(_: Path) -> Run:
    from loratools.io.hub import parse
    from loratools.io.storage import is_url

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        is_url(text)
        parse(text)

    return run


def _plain(data: bytes, random: Random, scramble: Scramble) -> bytes:
    if random.random() < 0.6:
        return scramble(data)
    parts = (
        *(b"(a*)*", b"(?:x|xx)+", b"{1,999}", b"{999999999}", b".*" * 20),
        *(b"[^", b"(?i)", b"\\1", b"(?=", b"(((", b"|"),
    )
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(parts) + data[at:]


def _first(name: str) -> Callable[[Path], factories.Made]:
    return {"peft": factories.peft, "mlx": factories.mlx}[name]


TARGETS: dict[str, Target] = {
    "header": Target(_header, seeds.headers, mutators.of_header),
    "safetensors": Target(_file("x.safetensors"), seeds.headers, mutators.of_header),
    "adapter": Target(_adapter, seeds.adapters, mutators.of_header),
    "peft-config": Target(_configuration(_first("peft")), seeds.configurations, mutators.of_json),
    "mlx-config": Target(_configuration(_first("mlx")), seeds.mlx_configurations, mutators.of_json),
    "index": Target(_model("model.safetensors.index.json"), seeds.indices, mutators.of_json),
    "bin-index": Target(_model("pytorch_model.bin.index.json"), seeds.indices, mutators.of_json),
    "model-config": Target(_model("config.json", "model.safetensors"), seeds.models, mutators.of_json),
    "pipeline": Target(_model("model_index.json", "model.safetensors"), seeds.models, mutators.of_json),
    "network-config": Target(
        _model("unet/config.json", "diffusion_pytorch_model.safetensors"), seeds.models, mutators.of_json
    ),
    "torch-zip": Target(_file("x.pt"), seeds.archives, mutators.of_zip),
    "torch-legacy": Target(_file("x.ckpt"), seeds.legacy, mutators.of_pickle),
    "opcodes": Target(_pickle, seeds.pickles, mutators.of_pickle),
    "npz": Target(_file("x.npz"), seeds.arrays, mutators.of_zip),
    "gguf": Target(_file("x.gguf"), seeds.ggufs, mutators.numbers),
    "recipe": Target(_recipe("recipe.json"), seeds.recipes, mutators.of_json),
    "yaml-recipe": Target(_recipe("recipe.yaml"), seeds.yaml_recipes, _plain),
    "journal": Target(_journal, seeds.journals, _lines),
    "pack-index": Target(_pack_index, seeds.pack_indices, mutators.of_json),
    "pack-journal": Target(_pack_journal, seeds.pack_journals, _one_line),
    "hub-url": Target(_url, seeds.urls, _plain),
    "pattern": Target(_pattern, seeds.patterns, _plain),
}
