"""Changes that keep a file's frame whole, so that what lies behind its lengths and checksums is reached.

Each takes the bytes and a source of randomness and gives other bytes; ``scramble`` is the engine's own way of changing
bytes that mean nothing to it.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Scramble = Callable[[bytes], bytes]
Mutator = Callable[[bytes, Random, Scramble], bytes]

_DEEP = 3000
_MOST_INFLATED = 1 << 20
_NUMBERS = (0, 1, 2, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = (
    *(
        "",
        ".",
        "..",
        "../x",
        "/etc/hostname",
        "C:\\x",
        "file:///x",
        "a\x00b",
        "\x1b[2J",
        "\ud800",
        "x" * 5000,
    ),
    *("dtype", "F32", "F4", "C64", "weight_map", "lora_alpha", "__metadata__", "model.safetensors", "(a+)+b"),
    *("base_model.model.x.lora_A.weight", "lora_unet_x.alpha", "ñ", "\u202e", "1e999", "NaN", "-1"),
)
# What json.dumps cannot write, put in afterwards for a text of its own.
_RAW = {
    "<digits>": "1" * 400,
    "<many digits>": "1" * 5000,
    "<exponent>": "1e999",
    "<nan>": "NaN",
    "<deep>": "[" * _DEEP + "]" * _DEEP,
    "<deep objects>": '{"a":' * _DEEP + "1" + "}" * _DEEP,
}


def flips(random: Random) -> Scramble:
    """A way of changing bytes for engines that have none: single bytes, numbers, pieces cut, doubled and moved."""

    def scramble(data: bytes) -> bytes:
        made = bytearray(data)
        for _ in range(1 << random.randrange(4)):
            at = random.randrange(len(made) + 1)
            stop = min(len(made), at + random.choice((1, 1, 2, 4, 8, 40)))
            what = random.randrange(5)
            if what == 0 and at < len(made):
                made[at] ^= 1 << random.randrange(8)
            elif what == 1:
                made[at:stop] = random.randbytes(stop - at)
            elif what == 2:
                del made[at:stop]
            elif what == 3:
                made[at:at] = made[at:stop]
            else:
                made[at : at + 8] = struct.pack("<Q", random.choice(_NUMBERS))
        return bytes(made)

    return scramble


def numbers(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """Numbers of four and eight bytes put anywhere: counts, lengths and offsets of binary formats."""
    if random.random() < 0.5 or len(data) < 8:
        return scramble(data)
    made = bytearray(data)
    for _ in range(random.randrange(1, 3)):
        at = random.randrange(len(made) - 7)
        number = random.choice(_NUMBERS)
        if random.random() < 0.5:
            made[at : at + 8] = struct.pack("<Q", number)
        else:
            made[at : at + 4] = struct.pack("<I", number & 0xFFFFFFFF)
    return bytes(made)


def of_json(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """A value of a JSON text replaced, doubled, taken out, or buried; or its bytes changed."""
    if random.random() < 0.4:
        return scramble(data)
    try:
        value = json.loads(data)
        for _ in range(random.randrange(1, 4)):
            value = _changed(value, random)
        text = json.dumps(value)
    except (ValueError, RecursionError, UnicodeDecodeError):
        return scramble(data)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    if random.random() < 0.05:
        text = text.replace(",", f",{text[1 : text.find(',')]},", 1)  # most often a name twice
    return text.encode("utf-8", "replace")


def _changed(value: Any, random: Random) -> Any:
    """The value with one thing in it changed, at any depth."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.9:
        names = list(value) if isinstance(value, dict) else range(len(value))
        name = random.choice(names)
        what = random.random()
        if what < 0.1:
            del value[name]
        elif what < 0.2 and isinstance(value, dict):
            value[random.choice(_TEXTS)] = value[name]
        elif what < 0.3 and isinstance(value, list):
            value.append(value[name])
        else:
            value[name] = _changed(value[name], random)
        return value
    return _odd(value, random)


def _odd(value: Any, random: Random) -> Any:
    if isinstance(value, int) and random.random() < 0.4:
        return value + random.choice((-8, -1, 1, 8))
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: random.choice(_NUMBERS),
        lambda: -random.choice(_NUMBERS),
        lambda: random.choice(_TEXTS),
        lambda: random.choice(tuple(_RAW)),
        lambda: random.choice((None, True, False, 0.5, -1.0, [], {}, [[]])),
        lambda: [value],
        lambda: {"a": value},
        lambda: [value] * random.randrange(100),
    )
    return random.choice(kinds)()


def of_header(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """A safetensors file whose header is changed and whose length before it is true again."""
    if random.random() < 0.2 or len(data) < 8:
        return scramble(data)
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    text = of_json(text.strip(), random, scramble)
    return len(text).to_bytes(8, "little") + text + rest


def of_pickle(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """A pickle with opcodes taken out, doubled, exchanged and put in; or its bytes changed."""
    if random.random() < 0.3:
        return scramble(data)
    try:
        places = [place or 0 for _, _, place in pickletools.genops(data)]
    except Exception:  # what has been changed before is often no pickle any more
        return scramble(data)
    stop = [*places[1:], places[-1] + 1]
    codes = [data[start:end] for start, end in zip(places, stop, strict=True)]
    for _ in range(random.randrange(1, 4)):
        at, other = random.randrange(len(codes)), random.randrange(len(codes))
        what = random.randrange(5)
        if what == 0:
            del codes[at]
            codes = codes or [b"."]
        elif what == 1:
            codes.insert(at, codes[other])
        elif what == 2:
            codes[at], codes[other] = codes[other], codes[at]
        elif what == 3:
            codes.insert(at, random.choice(_CODES))
        else:
            codes[at] = codes[at][:1] + scramble(codes[at][1:]) if len(codes[at]) > 1 else codes[at]
    return b"".join(codes) + data[stop[-1] :]


_CODES = (
    *(
        b"0",
        b"1",
        b"2",
        b"(",
        b")",
        b"]",
        b"}",
        b"N",
        b"t",
        b"l",
        b"d",
        b"s",
        b"u",
        b"a",
        b"e",
        b"R",
        b"b",
        b"Q",
    ),
    *(b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"h\x00", b"q\x00", b"K\x01"),
    *(b"\x8a\xff" + b"\x7f" * 255, b"J\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\xff"),
    *(
        b"\x8b\xff\xff\xff\x7f",
        b"T\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 7 + b"\x7f",
        b"P1\n",
        b"cos\nsystem\n",
    ),
)


def of_zip(data: bytes, random: Random, scramble: Scramble) -> bytes:
    """An archive with a member changed, renamed, doubled, compressed or taken out, its checksums true again."""
    if random.random() < 0.3:
        return numbers(data, random, scramble)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST_INFLATED:
                return scramble(data)
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged before
        return scramble(data)
    if not members:
        return scramble(data)
    at = random.randrange(len(members))
    name, content = members[at]
    what = random.randrange(8)
    if what < 5:
        members[at] = name, _member_changed(name, content, random, scramble)
    elif what == 5:
        members[at] = random.choice((*_TEXTS[:8], members[0][0], name + "x")), content
    elif what == 6:
        members.insert(at, members[random.randrange(len(members))])
    else:
        del members[at]
    return zipped(members, zipfile.ZIP_DEFLATED if random.random() < 0.2 else zipfile.ZIP_STORED)


def _member_changed(name: str, content: bytes, random: Random, scramble: Scramble) -> bytes:
    if name.endswith(".pkl"):
        return of_pickle(content, random, scramble)
    if name.endswith(".npy") and random.random() < 0.7:
        return of_array(content, random, scramble)
    return scramble(content)


def of_array(content: bytes, random: Random, scramble: Scramble) -> bytes:
    """A ``.npy`` member whose header is changed and whose length before it is true again."""
    if len(content) < 10:
        return scramble(content)
    stop = 10 + int.from_bytes(content[8:10], "little")
    text = scramble(content[10:stop]).replace(b"\n", b" ")
    if random.random() < 0.5:
        old, new = random.choice(
            ((b"<f4", b"|O"), (b"(", b"(-"), (b",", b"0,"), (b"False", b"True"), (b"(", b"(("))
        )
        text = content[10:stop].replace(old, new)
    return content[:8] + struct.pack("<H", len(text) & 0xFFFF) + text + content[stop:]


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of these members, names twice and all."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = name.encode("utf-8", "replace").decode().replace("\x00", "") or "x"
            info.compress_type = compression
            archive._didModify = True
            archive.NameToInfo.pop(info.filename, None)  # zipfile warns of names that it has already
            archive.writestr(info, content)
    return made.getvalue()
