"""The work on one tensor, sent to other processes as plain data, gives what it gives here, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools.engine import Item, Plan
from loratools.engine.kept import held
from loratools.errors import OptionError
from loratools.io.reader import open_tensors
from loratools.model import Adapter
from loratools.ops._bake_tensor import BakeJob, bake_tensor
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from loratools.ops.verify import verify
from loratools.tensors import BytesSource, LazySource, TensorRef, from_scalar, from_torch
from tests.engine.processes import Processes
from tests.kinds import samples
from tests.ops import checkpoints as make
from tests.ops import sd15_checkpoints
from tests.ops.baking import Disk, change_of, term


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Processes]:
    with Processes() as engine:
        yield engine


def test_every_kind_of_source_can_be_sent_and_brings_its_bytes(tmp_path: Path) -> None:
    tensor = (torch.arange(6.0).reshape(2, 3) - 2).to(torch.bfloat16)
    torch.save({"a": tensor}, tmp_path / "zip.bin")
    torch.save({"a": tensor}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    factories.write_safetensors(tmp_path / "a.safetensors", {"a": tensor}, None)
    refs = [
        *(open_tensors(path).tensors["a"] for path in sorted(tmp_path.iterdir()) if path.suffix),
        held("", tensor),
        from_torch("", tensor),
        from_torch("", tensor.t().contiguous()).flipped(),
        TensorRef("", (2, 3), "BF16", BytesSource(from_torch("", tensor).raw())),
        TensorRef("", (2, 3), "BF16", LazySource(lambda: tensor.clone())),
    ]
    assert len(refs) == 8
    data = [pickle.dumps(ref) for ref in refs]
    for ref, sent in zip(refs, data, strict=True):
        found: TensorRef = pickle.loads(sent)
        assert found._replace(source=ref.source) == ref
        assert torch.equal(found.load(), tensor)
    assert pickle.loads(pickle.dumps(from_scalar("alpha", 4.0))).scalar() == 4.0


def test_a_view_is_sent_without_what_lies_around_it() -> None:
    whole = torch.zeros(1 << 20)
    assert len(pickle.dumps(from_torch("", whole[:8]))) < 1000


def test_arrays_of_an_npz_can_be_sent(tmp_path: Path) -> None:
    import numpy

    array = numpy.asfortranarray(numpy.arange(12, dtype=numpy.float32).reshape(3, 4))
    numpy.savez(tmp_path / "a.npz", array)
    with open_tensors(tmp_path / "a.npz") as opened:
        (ref,) = opened.tensors.values()
        sent = pickle.dumps(ref)
    assert numpy.array_equal(pickle.loads(sent).numpy(), array)


def test_a_module_of_any_kind_is_baked_elsewhere_to_the_same_bytes(
    elsewhere: Processes, tmp_path: Path
) -> None:
    disk = Disk(tmp_path)
    jobs = []
    for number, name in enumerate(samples.NAMES):
        module, base, _ = samples.sample(name)
        rounding = ("nearest", "stochastic", "compensated")[number % 3]
        jobs.append(
            BakeJob(
                change_of(disk.put(base, torch.bfloat16), term(module, 0.7)),
                rounding=rounding,
                seed=3,
                precise=bool(number % 2),
            )
        )
    items = [Item(str(number)) for number in range(len(jobs))]
    results = dict(elsewhere.run(Plan(bake_tensor, jobs, items)))
    assert len(results) == len(jobs)
    for number, found in results.items():
        here = bake_tensor(jobs[number])
        assert torch.equal(found.data.view(torch.int16), here.data.view(torch.int16))
        assert found.result == here.result


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter's file, and a checkpoint that it is for."""
    folder = tmp_path_factory.mktemp("style")
    adapter = factories.kohya(folder / "style.safetensors", "sd15", seed=1)
    return adapter.path, sd15_checkpoints.tensors()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_pickle(path: Path, out: Path) -> Path:
    torch.save(load_file(path), out)
    return out


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "rounding": "stochastic", "seed": 4}])
def test_a_checkpoint_is_baked_elsewhere_to_the_same_bytes(
    elsewhere: Processes,
    style: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    container: str,
    options: dict[str, object],
) -> None:
    base = sd15_checkpoints.sharded(tmp_path / "base", style[1])
    adapter = style[0] if container == "safetensors" else as_pickle(style[0], tmp_path / "style.bin")
    here = bake(base, [adapter], tmp_path / "here", weights=[0.8], **options)
    elsewhere.sent.clear()
    there = bake(base, [adapter], tmp_path / "there", weights=[0.8], engine=elsewhere, **options)
    files = contents(tmp_path / "here")
    assert len(files) == 3
    assert contents(tmp_path / "there") == files
    assert here.tensors == there.tensors
    assert elsewhere.sent
    if container == "safetensors":
        # Names, shapes and places, no data.
        assert sum(elsewhere.sent) < sum(tensor.nbytes for tensor in style[1].values()) / 2


def test_a_ckpt_is_extracted_elsewhere_to_the_same_bytes(elsewhere: Processes, tmp_path: Path) -> None:
    state = make.llama()
    base = make.save(state, tmp_path / "base.ckpt")
    tuned = make.shard(make.tuned(state), tmp_path / "tuned")
    here, there = tmp_path / "here", tmp_path / "there"
    _, one = extract(base, tuned, here, error=0.2, embeddings=True)
    elsewhere.sent.clear()
    _, other = extract(base, tuned, there, error=0.2, embeddings=True, engine=elsewhere)
    assert contents(here) == contents(there)
    assert one.modules == other.modules
    assert elsewhere.sent
    assert max(elsewhere.sent) < 4096


def test_a_size_is_spent_elsewhere_as_here(elsewhere: Processes, tmp_path: Path) -> None:
    state = make.llama()
    base = make.save(state, tmp_path / "base.safetensors")
    tuned = make.save(make.tuned(state, rank=8), tmp_path / "tuned.safetensors")
    found = [
        extract(base, tuned, tmp_path / str(number), size="12KB", engine=engine)[1]
        for number, engine in enumerate((None, elsewhere))
    ]
    assert found[0].modules == found[1].modules
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_a_bake_is_verified_elsewhere_as_here(
    elsewhere: Processes, style: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base = sd15_checkpoints.safetensors(tmp_path / "base.safetensors", style[1])
    adapter = as_pickle(style[0], tmp_path / "style.bin")
    bake(base, [adapter], tmp_path / "baked.safetensors")
    here = verify(base, [adapter], tmp_path / "baked.safetensors")
    elsewhere.sent.clear()
    assert verify(base, [adapter], tmp_path / "baked.safetensors", engine=elsewhere) == here
    assert here.ok
    assert len(elsewhere.sent) == len(here.tensors) + here.untouched


def test_an_adapter_that_was_extracted_in_memory_is_baked_elsewhere(
    elsewhere: Processes, tmp_path: Path
) -> None:
    state = make.llama()
    base = make.save(state, tmp_path / "base.safetensors")
    tuned = make.save(make.tuned(state), tmp_path / "tuned.safetensors")
    found = lt.extract(base, tuned, rank=3, engine=elsewhere)
    assert isinstance(found, Adapter)
    lt.bake(base, [found], tmp_path / "here.safetensors")
    lt.bake(base, [found], tmp_path / "there.safetensors", engine=elsewhere)
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
    assert lt.verify(base, [found], tmp_path / "there.safetensors", engine=elsewhere).ok


def test_an_error_elsewhere_is_told_as_here_and_leaves_nothing(elsewhere: Processes, tmp_path: Path) -> None:
    from loratools.errors import NonFiniteError

    state = make.llama()
    base = make.save(state, tmp_path / "base.safetensors")
    tuned = make.save(make.tuned(state), tmp_path / "tuned.safetensors")
    found, _ = extract(base, tuned, rank=3)
    assert found is not None
    one = dict(list(found.modules.items())[:1])  # which of several errors comes first, nobody promises
    out = tmp_path / "out.safetensors"
    said = []
    for engine in (None, elsewhere):
        with pytest.raises(NonFiniteError) as caught:
            bake(base, [replace(found, modules=one)], out, weights=[1e6], dtype="float16", engine=engine)
        said.append((str(caught.value), caught.value.keys))
        assert not out.exists()
    assert said[0] == said[1]


def test_an_engine_of_ones_own_computes_on_the_cpu(elsewhere: Processes, tmp_path: Path) -> None:
    state = make.llama()
    base = make.save(state, tmp_path / "base.safetensors")
    with pytest.raises(OptionError, match="engine"):
        extract(base, base, rank=2, device="cuda", engine=elsewhere)
