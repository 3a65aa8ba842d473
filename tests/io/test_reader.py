"""Opening files by content, and the life of their maps."""

from __future__ import annotations

import errno
import gc
import io
import mmap
import os
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import factories as make
import numpy
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import LoraError, MalformedFileError, MissingFileError
from loratools.io import build, open_tensors, sniff, write_safetensors
from loratools.tensors import DTYPES, BytesSource, TensorRef

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / ".." / "shared" / "corpus"
PACKAGE_DTYPES = sorted(safetensors.torch._TYPES)


def random_tensor(dtype, shape, seed=0):
    """A tensor of random bits (booleans: of 0 and 1), as nothing else shows a change of dtype."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, DTYPES[dtype].torch)
    count = torch.Size(shape).numel() * DTYPES[dtype].bits // 8
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


named = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(PACKAGE_DTYPES), st.lists(st.integers(0, 3), max_size=4).map(tuple)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    named,
    st.dictionaries(st.text("abc é\n", max_size=5), st.text('abc é"', max_size=5), min_size=1, max_size=3),
)
def test_reads_what_the_package_writes_and_the_reverse(tmp_path_factory, specs, metadata):
    folder = tmp_path_factory.mktemp("x")
    tensors = {name: random_tensor(*spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    safetensors.torch.save_file(tensors, folder / "theirs", metadata)
    with open_tensors(folder / "theirs") as theirs:
        assert theirs.metadata == metadata
        assert {name: bits(ref.load()) for name, ref in theirs.tensors.items()} == {
            name: bits(tensor) for name, tensor in tensors.items()
        }
        assert {name: (ref.dtype, ref.shape) for name, ref in theirs.tensors.items()} == specs
        size = write_safetensors(folder / "ours", theirs.tensors.values(), metadata)
        assert size == (folder / "ours").stat().st_size
    with safetensors.safe_open(folder / "ours", "pt") as ours:
        assert (ours.metadata(), set(ours.keys())) == (metadata, set(tensors))
        for name, tensor in tensors.items():
            read = ours.get_tensor(name)
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))


def test_rewriting_in_canonical_order_gives_the_packages_bytes(tmp_path):
    tensors = {
        f"{prefix}.{dtype}": random_tensor(dtype, (3, 2)) for prefix in "ba" for dtype in PACKAGE_DTYPES
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    with open_tensors(tmp_path / "theirs") as theirs:
        shuffled = sorted(theirs.tensors.values(), key=lambda ref: ref.name[::-1])
        write_safetensors(tmp_path / "ours", shuffled, theirs.metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_order_and_offsets_follow_the_file(tmp_path):
    refs = [TensorRef(name, (2,), "U8", BytesSource(memoryview(name.encode() * 2))) for name in "cab"]
    write_safetensors(tmp_path / "x", refs, {"z": "1", "a": "2"}, order="given")
    with open_tensors(tmp_path / "x") as file:
        assert [(name, bytes(ref.raw())) for name, ref in file.tensors.items()] == [
            ("c", b"cc"),
            ("a", b"aa"),
            ("b", b"bb"),
        ]
        assert list(file.metadata) == ["z", "a"]
        assert (file.container, file.size) == ("safetensors", (tmp_path / "x").stat().st_size)


def test_header_without_data(tmp_path):
    for specs in ([], [("a", "F32", (0, 3)), ("b", "U8", (0,))]):
        (tmp_path / "x").write_bytes(build(specs, {}))
        with open_tensors(tmp_path / "x") as file:
            assert [(ref.name, ref.dtype, tuple(ref.load().shape)) for ref in file.tensors.values()] == specs
            assert all(ref.raw().nbytes == 0 for ref in file.tensors.values())


def test_data_that_lies_unaligned(tmp_path):
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    head = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    (tmp_path / "x").write_bytes(len(head).to_bytes(8, "little") + head + values.numpy().tobytes())
    assert (8 + len(head)) % 4
    with open_tensors(tmp_path / "x") as file:
        loaded = file.tensors["a"].load()
        assert torch.equal(loaded, values)
        assert loaded.data_ptr() % 4 == 0
        assert file.tensors["a"].numpy().tolist() == values.tolist()


def one_tensor(path):
    safetensors.numpy.save_file({"a": numpy.arange(4, dtype=numpy.float32)}, path)
    return path


def test_loading_warns_of_nothing_and_writing_never_reaches_the_file(tmp_path):
    path = one_tensor(tmp_path / "x")
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_tensors(path) as file:
            file.tensors["a"].load().zero_()
    assert path.read_bytes() == before


def test_closing_releases_the_map_or_leaves_it_to_the_tensors(tmp_path):
    path = one_tensor(tmp_path / "x")
    file = open_tensors(path)
    ref = file.tensors["a"]
    assert ref.load().tolist() == [0, 1, 2, 3]
    mapped = ref.source.file._map
    file.close()
    assert mapped.closed
    with pytest.raises(LoraError, match="the file was closed"):
        ref.load()
    file.close()  # once more does no harm

    file = open_tensors(path)
    tensor = file.tensors["a"].load()
    array = file.tensors["a"].numpy()
    file.close()
    del file
    assert tensor.tolist() == array.tolist() == [0, 1, 2, 3]


def test_a_failed_open_leaves_no_map(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(build([("a", "U8", (4,))], {}) + b"12")
    closed = []
    from loratools.io.mapped import FileMap

    close = FileMap.close
    monkeypatch.setattr(FileMap, "close", lambda self: (closed.append(self.path), close(self))[1])
    with pytest.raises(MalformedFileError, match="2 of 4 bytes of data are missing"):
        open_tensors(tmp_path / "x")
    assert closed == [str(tmp_path / "x")]


def test_a_system_that_refuses_private_maps_gets_a_read_only_one(tmp_path, monkeypatch):
    path = one_tensor(tmp_path / "x")
    real, asked = mmap.mmap, []

    def refusing(handle, length, access):
        asked.append(access)
        if access == mmap.ACCESS_COPY:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(handle, length, access=access)

    monkeypatch.setattr(mmap, "mmap", refusing)
    with open_tensors(path) as file:
        assert asked == [mmap.ACCESS_COPY, mmap.ACCESS_READ]
        assert file.tensors["a"].raw().readonly
        assert file.tensors["a"].numpy().tolist() == [0, 1, 2, 3]


def a_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


STRANGERS = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "HTML": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "saved web page"),
    "TorchScript": (a_zip({"m/data.pkl": "", "m/code/x.py": "", "m/constants.pkl": ""}), "TorchScript"),
    "zip of weights": (
        a_zip({"lora/style.safetensors": "x"}),
        r"a zip archive of 1 files.*style\.safetensors",
    ),
    "empty zip": (a_zip({}), "a zip archive of 0 files"),
    "tar": (b"\0" * 257 + b"ustar\x0000" + b"\0" * 300, "tar archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 30, "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\0" + b"\0" * 30, "a RAR archive"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 30, "a gzip archive"),
    "npy": (b"\x93NUMPY\1\0" + b"\0" * 30, "a single numpy array"),
    "JSON": (b'{"a": 1, {"r": 8}}', "JSON text, not tensors"),
    "text": (b"just a readme\nof mine\n", "plain text, not tensors"),
    "noise": (
        b"\1\2\3\4\xff\xfe\0\0" + b"\0" * 30,
        "no known container .it begins with 01 02 03 04 ff fe 00 00",
    ),
    "length without brace": (b"\x02\0\0\0\0\0\0\0[]", r"begins with b'\['"),
    "broken zip": (a_zip({"a.npy": "x" * 99})[:60], "zip archive is damaged"),
    "same member twice": (None, r"members of the same name \(a/data.pkl\)"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_other_files_are_refused_with_a_reason(tmp_path, case):
    content, words = STRANGERS[case]
    path = tmp_path / "model.safetensors"  # the name is no argument
    if content is None:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")
            archive.writestr("a/data.pkl", "1")
            archive.writestr("a/data.pkl", "2")
    else:
        path.write_bytes(content)
    with pytest.raises(MalformedFileError, match=f"(?s){words}"):
        open_tensors(path)
    with pytest.raises(MalformedFileError):
        sniff(path)


def test_sniff_goes_by_content(tmp_path):
    one_tensor(tmp_path / "a.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "c.npz", _use_new_zipfile_serialization=False)
    with open(tmp_path / "d.pt", "wb") as file:
        numpy.savez(file, a=numpy.ones(2))
    assert [sniff(tmp_path / name) for name in ("a.ckpt", "b.safetensors", "c.npz", "d.pt")] == [
        "safetensors",
        "pickle",
        "pickle",
        "npz",
    ]


def test_folder_missing_file_and_near_misses(tmp_path):
    with pytest.raises(MalformedFileError, match="a folder, not a file"):
        open_tensors(tmp_path)
    one_tensor(tmp_path / "adapter.safetensors")
    with pytest.raises(MissingFileError, match=r"Did you mean: adapter\.safetensors") as caught:
        open_tensors(tmp_path / "adaptor.safetensors")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(MissingFileError, match="folder does not exist"):
        open_tensors(tmp_path / "no" / "x.safetensors")
    with pytest.raises(MissingFileError):
        open_tensors(tmp_path / "adapter.safetensors" / "x")
    with pytest.raises(LoraError, match="cannot be read"):
        open_tensors("nul\0byte")


def test_permission_errors_are_ours(tmp_path, monkeypatch):
    path = one_tensor(tmp_path / "x")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(LoraError, match="cannot be read: Permission denied"):
        open_tensors(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MalformedFileError, match="not a regular file"):
        open_tensors(tmp_path / "pipe")


def test_safetensors_need_neither_torch_nor_numpy_and_npz_no_torch(tmp_path):
    one_tensor(tmp_path / "x.safetensors")
    numpy.savez(tmp_path / "x.npz", a=numpy.ones(2))
    program = textwrap.dedent("""
        import sys
        from loratools.io import open_tensors, write_safetensors
        with open_tensors("x.safetensors") as file:
            assert [ref.raw().nbytes for ref in file.tensors.values()] == [16]
            write_safetensors("y.safetensors", file.tensors.values(), {})
        with open_tensors("x.npz") as file:
            assert [ref.raw().nbytes for ref in file.tensors.values()] == [16]
        print(sorted({"torch", "numpy", "safetensors"} & set(sys.modules)))
    """)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_real_files_open_or_are_refused_as_ours():
    paths = [
        path
        for path in sorted(CORPUS.rglob("*"))
        if path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".npz"}
    ]
    if not paths:
        pytest.skip("the corpus of real adapters is not beside this checkout")
    refused = []
    for path in paths:
        try:
            with open_tensors(path) as file:
                assert file.size == path.stat().st_size
                for name, ref in file.tensors.items():
                    assert ref.name == name
                    assert ref.raw().nbytes == ref.nbytes
        except LoraError:
            refused.append(path.name)
    assert refused == ["gguf_qbias.pt"]
    assert len(paths) > 30


def test_a_file_that_is_let_go_warns_of_nothing(tmp_path: Path) -> None:
    """Adapters are lazy: who drops one has closed its file, and need not be told to."""
    made = make.kohya(tmp_path / "a.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = open_tensors(str(made.path))
        del opened
        gc.collect()
    assert not [str(each.message) for each in caught if str(made.path) in str(each.message)]
