"""Resizing to a size: never over, never refused where it can be reached, and spent as far as it goes."""

from __future__ import annotations

import math

import factories
import pytest

import loratools as lt
from loratools.errors import OptionError
from loratools.ops.resize import resize_file

# So narrow that a configuration's line on a rank of its own takes more bytes than the rank.
NARROW = tuple(
    (f"model.layers.{layer}.self_attn.{name}", (6, 5)) for layer in (0, 1) for name in ("q_proj", "v_proj")
)


def bytes_of(output):
    return sum(each.stat().st_size for each in output.iterdir()) if output.is_dir() else output.stat().st_size


def smallest(path, output, **limits):
    with pytest.raises(OptionError, match="smallest possible") as caught:
        resize_file(path, output, size=1, **limits)
    assert not output.exists()
    return int("".join(char for char in caught.value.expected if char.isdigit()))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return factories.peft(tmp_path_factory.mktemp("narrow") / "in", NARROW, rank=5).path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "in.safetensors"
    return factories.kohya(path, "sd15", rank=6, ranks={"to_k": 4, "fc1": 3}, mid=True).path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return factories.diffusers(tmp_path_factory.mktemp("plain") / "in.safetensors", "sd15", rank=3).path


@pytest.mark.parametrize("name", ["narrow", "mixed", "plain"])
def test_every_size_from_the_smallest_is_reached(request, tmp_path, name):
    """A file's header and configuration grow with what they say of ranks, in leaps."""
    path = request.getfixturevalue(name)
    output = tmp_path / ("out" if path.is_dir() else "out.safetensors")
    least = smallest(path, output)
    with pytest.raises(OptionError):
        resize_file(path, output, size=least - 1)
    energies = []
    for more in (0, 1, 7, 43, 44, 45, 60, 87, 88, 90, 120, 150, 250, 400, 700, 1500):
        report = resize_file(path, output, size=least + more, overwrite=True)
        assert bytes_of(output) == report.bytes <= least + more
        energies.append(report.energy)
    assert energies[-1] > energies[0]


@pytest.mark.parametrize("size", [4_000, 5_000, 6_000])
def test_a_configuration_wastes_no_rank(tmp_path, size):
    """The bytes that are left would not hold the cheapest rank and a line of the configuration."""
    made = factories.peft(tmp_path / "in", rank=8)
    report = resize_file(made.path, tmp_path / "out", size=size)
    cheapest = min(
        4 * (each.shape[0] + math.prod(each.shape[1:])) for each in report.modules if each.rank < 8
    )
    line = 2 * len('    "model.layers.0.self_attn.q_proj": 2,\n')
    assert 0 <= size - report.bytes < cheapest + line


def test_all_ranks_are_kept_where_there_is_room(narrow, tmp_path):
    report = resize_file(narrow, tmp_path / "out", size="1MB")
    assert {each.rank for each in report.modules} == {5}
    assert report.energy == 1.0


def test_the_largest_rank_holds_for_multiples_too(mixed, tmp_path):
    report = resize_file(mixed, tmp_path / "out.safetensors", size="1MB", max_rank=5, multiple_of=4)
    assert {each.rank for each in report.modules} == {3, 4}
    small = resize_file(mixed, tmp_path / "small.safetensors", size="1MB", conv_rank=2, max_rank=3)
    wide = [each.rank for each in small.modules if each.shape[2:] == (3, 3)]
    assert wide == [2, 2]


def test_the_rank_that_does_not_fit_is_named(mixed, tmp_path):
    output = tmp_path / "out.safetensors"
    with pytest.raises(OptionError, match="does not hold rank 4 of all 12 modules"):
        resize_file(mixed, output, size="3kB", multiple_of=4)
    least = smallest(mixed, output, multiple_of=4)
    report = resize_file(mixed, output, size=least, multiple_of=4)
    assert report.bytes == least
    assert {each.rank for each in report.modules} == {3, 4}


@pytest.mark.parametrize("limits", [{"min_rank": 5, "max_rank": 6}, {"max_rank": 3}, {"conv_rank": 2}])
def test_limits_that_no_multiple_lies_within_are_refused(mixed, limits):
    with pytest.raises(OptionError, match="the smallest multiple of 4 that is allowed"):
        lt.resize(lt.load(mixed), energy=0.9, multiple_of=4, **limits)
