"""Values of whole bakes against dense float64, for every tabled architecture, dialect, prefix and folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import archs
from loratools.archs._table import Component
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops.bake import bake
from loratools.tensors import from_torch
from tests.ops import bases as make

Array = np.ndarray
STRENGTH = 0.7
# What LyCORIS adds to DoRA's norms.
EPS = 2.0**-23


def _module(target: Target, factors: dict[str, Array], height: int, kind: str = "lora") -> Module:
    refs = {role: from_torch(f"{target.path}.{role}", torch.tensor(array)) for role, array in factors.items()}
    rank = factors["up"].shape[1] if "up" in factors else None
    return Module(target, kind, refs, rank=rank, shape=(height, make.WIDTH))


def _lora(rng: np.random.Generator, target: Target, base: Array) -> tuple[Module, Array]:
    up, down = rng.normal(size=(len(base), 2)), rng.normal(size=(2, make.WIDTH))
    return _module(target, {"up": up, "down": down}, len(base)), up @ down


def _dora(rng: np.random.Generator, target: Target, base: Array, axis: int = 0) -> tuple[Module, Array]:
    module, delta = _lora(rng, target, base)
    size = (len(base), 1) if axis == 0 else (1, make.WIDTH)
    magnitude = rng.uniform(1, 2, size=size)
    ref = from_torch("m", torch.tensor(magnitude))
    changed = base + delta
    norms = np.linalg.norm(changed, axis=1 - axis, keepdims=True) + EPS
    return module._replace(
        magnitude=ref, magnitude_axis=("out", "in")[axis]
    ), magnitude * changed / norms - base


def _loha(rng: np.random.Generator, target: Target, base: Array) -> tuple[Module, Array]:
    sizes = ((len(base), 2), (2, make.WIDTH))
    factors = {
        f"hada_w{n}_{x}": rng.normal(size=size) for n in "12" for x, size in zip("ab", sizes, strict=True)
    }
    one, two = (factors[f"hada_w{n}_a"] @ factors[f"hada_w{n}_b"] for n in "12")
    return _module(target, factors, len(base), "loha"), one * two


def _lokr(rng: np.random.Generator, target: Target, base: Array) -> tuple[Module, Array]:
    factors = {
        "lokr_w1": rng.normal(size=(2, 2)),
        "lokr_w2": rng.normal(size=(len(base) // 2, make.WIDTH // 2)),
    }
    return _module(target, factors, len(base), "lokr"), np.kron(factors["lokr_w1"], factors["lokr_w2"])


def _oft(rng: np.random.Generator, target: Target, base: Array) -> tuple[Module, Array]:
    size = len(base) // 2
    blocks = 0.3 * rng.normal(size=(2, size, size)) / size
    turned = []
    for block, rows in zip(blocks, (base[:size], base[size:]), strict=True):
        skew, one = block - block.T, np.eye(size)
        turned.append(((one + skew) @ np.linalg.inv(one - skew)).T @ rows)
    return _module(target, {"oft_blocks": blocks}, len(base), "oft"), np.concatenate(turned) - base


Maker = Callable[[np.random.Generator, Target, Array], tuple[Module, Array]]
MAKERS: tuple[Maker, ...] = (
    *(_lora, _dora, _loha, _lokr, _oft),
    lambda rng, target, base: _dora(rng, target, base, axis=1),
)


def _marked(row: Component) -> Iterator[tuple[str, str]]:
    """What may stand before a component's names in a file, and the folders that it may lie in."""
    found = [("", "")]
    for layout in ("checkpoint", "comfy", "diffusers"):
        found += [(prefix, "") for prefix in row.prefixes.get(layout, ())]
    found += [("", prefix.rstrip(".")) for prefix in row.prefixes.get("diffusers", ())]
    return cycle(dict.fromkeys(found))


def _written(folder: Path, tensors: dict[str, torch.Tensor], prefix: str, part: str) -> Path:
    named = {prefix + key: tensor for key, tensor in tensors.items()}
    folder.mkdir()
    if not part:
        save_file(named, folder / "base.safetensors")
        return folder / "base.safetensors"
    (folder / "base" / part).mkdir(parents=True)
    (folder / "base" / "model_index.json").write_text("{}")
    # Says that no head uses the embedding too.
    (folder / "base" / part / "config.json").write_text('{"tie_word_embeddings": false}')
    save_file(named, folder / "base" / part / "model.safetensors")
    return folder / "base"


@pytest.mark.parametrize(("arch", "component"), make.tabled())
def test_every_row_gets_its_change(arch: str, component: str, tmp_path: Path) -> None:
    row = archs.get(arch).component(component)
    assert row is not None
    names = {dialect: make.spelt(row, dialect) for dialect in make.dialects(row)}
    names = {dialect: spelt for dialect, spelt in names.items() if spelt}
    pairs = [(here, there) for here, there in product(names, names) if here != there or len(names) == 1]
    marked, makers = _marked(row), cycle(MAKERS)
    if component == "text_encoder" and any("embed_tokens" in name for name in names["native"]):
        marked = ((prefix, part) for prefix, part in marked if prefix or part)
    rng = np.random.default_rng(len(arch) + len(component))
    for number, (here, there) in enumerate((*pairs, *pairs)):
        whole = {
            named.path: rng.normal(size=(named.height, make.WIDTH)) for named, _ in names["native"].values()
        }
        wanted = {path: array.copy() for path, array in whole.items()}
        modules = []
        maker = next(makers)
        for named, rows in names[there].values():
            own = make.rows_of(named, rows)
            module, delta = maker(rng, Target(component, named.path, rows), whole[named.path][own])
            modules.append(module)
            wanted[named.path][own] += STRENGTH * delta
        stored = {
            f"{name}.weight": torch.tensor(whole[named.path][make.rows_of(named, rows)])
            for name, (named, rows) in names[here].items()
        }
        prefix, part = next(marked)
        base = _written(tmp_path / str(number), stored, prefix, part)
        output = tmp_path / str(number) / ("baked" if part else "baked.safetensors")
        adapter = Adapter({each.target: each for each in modules}, arch=arch, layout=Layout("kohya"))

        bake(base, [adapter], output, weights=[STRENGTH], arch=arch, threads=1)

        found = load_file(output / part / "model.safetensors" if part else output)
        for name, (named, rows) in names[here].items():
            expected = wanted[named.path][make.rows_of(named, rows)]
            np.testing.assert_allclose(found[f"{prefix}{name}.weight"], expected, rtol=1e-5, atol=1e-5)
