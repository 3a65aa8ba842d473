"""Nothing of a difference is lost in silence, and every figure of the report is true of the tensors."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from loratools.cli import cli
from loratools.ops.extract import extract
from tests.ops import checkpoints as make
from tests.ops.test_extract_checkpoints import fixture_script


def pair() -> tuple[make.State, make.State]:
    """Two checkpoints that differ in every tensor they share, each with a tensor of its own."""
    base = make.llama()
    base["model.rotary.inv_freq"] = make.random((4,), 60)
    base["model.position_ids"] = torch.arange(5)
    tuned = {
        key: value + (make.random(tuple(value.shape), 70 + at) if value.is_floating_point() else 1)
        for at, (key, value) in enumerate(base.items())
    }
    base["gone.bias"] = make.random((4,), 61)
    tuned["new.bias"] = make.random((3,), 62)
    return base, tuned


@pytest.mark.parametrize(
    ("embeddings", "small", "to"), list(product([False, True], [False, True], ["peft", "comfy"]))
)
def test_what_is_taken_and_what_is_left_out_is_the_whole_difference(
    embeddings: bool, small: bool, to: str, tmp_path: Path
) -> None:
    base, tuned = pair()
    paths = make.save(base, tmp_path / "a.ckpt"), make.save(tuned, tmp_path / "b.safetensors")
    _, report = extract(*paths, rank=2, embeddings=embeddings, full_small=small, to=to)
    nothing = torch.zeros(1)
    whole = sum(
        float((tuned.get(key, nothing).double() - base.get(key, nothing).double()).square().sum())
        for key in {*base, *tuned}
    )
    taken = sum(module.norm**2 for module in report.modules)
    left = sum(each.norm**2 for each in report.left_out)
    assert taken + left == pytest.approx(whole, rel=1e-6)
    assert {"gone.bias", "new.bias", "model.position_ids"} <= {each.key for each in report.left_out}


SPECTRA = {
    "heavy": lambda count: np.arange(1, count + 1) ** -0.6,
    "noise": lambda count: np.where(np.arange(count) < 6, 1.0, 1e-3),
    "deficient": lambda count: np.where(np.arange(count) < 9, 1 - 0.1 * np.arange(count), 0.0),
    "flat": np.ones,
}


def with_spectrum(shape: tuple[int, int], sigma: np.ndarray, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, len(sigma))))[0] for side in shape)
    return torch.from_numpy((u * sigma) @ v.T).float()


@pytest.mark.parametrize("svd", ["auto", "exact", "randomized"])
@pytest.mark.parametrize("rule", ["rank", "energy", "error", "ratio"])
def test_ranks_and_figures_are_those_of_a_full_decomposition(svd: str, rule: str, tmp_path: Path) -> None:
    tuned = {
        f"{name}{at}.weight": with_spectrum(shape, spectrum(min(shape)), at)
        for at, shape in enumerate([(120, 50), (40, 130), (64, 64)])
        for name, spectrum in SPECTRA.items()
    }
    base = {key: torch.zeros_like(value) for key, value in tuned.items()}
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    value = {"rank": 7, "energy": 0.9, "error": 0.2, "ratio": 0.15}[rule]
    found, report = extract(*paths, **{rule: value}, svd=svd, dtype="float32")
    assert found is not None
    factors = {target.path: module for target, module in found.modules.items()}
    total = lost = 0.0
    for module in report.modules:
        dense = tuned[f"{module.target}.weight"].double()
        sigma = np.linalg.svd(dense.numpy(), compute_uv=False)
        kept = np.cumsum(sigma**2) / np.sum(sigma**2)
        wanted = {
            "rank": 7,
            "energy": int((kept < value).sum()) + 1,
            "error": int((np.sqrt(np.maximum(0, 1 - kept)) > value).sum()) + 1,
            "ratio": int((sigma > sigma[0] * value).sum()),
        }[rule]
        assert module.rank == wanted, module
        best = float(np.sqrt(max(0.0, 1 - kept[wanted - 1])))
        true = float((factors[module.target].delta().double() - dense).norm() / dense.norm())
        assert true <= 1.001 * best + 2e-6
        assert module.error == pytest.approx(true, abs=1e-5)
        assert module.energy == pytest.approx(1 - module.error**2, abs=1e-12)
        assert module.optimum <= best + 1e-6
        total, lost = total + float(dense.norm()) ** 2, lost + (true * float(dense.norm())) ** 2
    assert report.error == pytest.approx((lost / total) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("svd", ["auto", "randomized"])
@pytest.mark.parametrize("rule", [{"rank": 5}, {"energy": 0.5}, {"size": 60_000}])
def test_the_same_bytes_for_any_number_of_threads(svd: str, rule: dict[str, float], tmp_path: Path) -> None:
    base = {f"m{at}.weight": make.random((90 + 8 * (at % 3), 70), at) for at in range(7)}
    tuned = {
        key: value + make.random(tuple(value.shape), 50 + at) for at, (key, value) in enumerate(base.items())
    }
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    written = set()
    for number, threads in enumerate((1, 2, 4, 1)):
        output = tmp_path / f"{number}.safetensors"
        extract(*paths, output, to="comfy", svd=svd, threads=threads, **rule)
        written.add(output.read_bytes())
    assert len(written) == 1


def test_extracting_baking_and_verifying_on_the_command_line(tmp_path: Path) -> None:
    """Two small checkpoints of Stable Diffusion 1.5 in pickles: the adapter gives back the tuned one."""
    script = fixture_script()
    base = script.base(8, torch.float32)
    tuned = dict(base)
    script.tune(tuned)
    first, second = make.save(base, tmp_path / "base.ckpt"), make.save(tuned, tmp_path / "tuned.ckpt")
    adapter, baked = tmp_path / "lora.safetensors", tmp_path / "baked.ckpt"

    def run(*words: object) -> dict:
        done = CliRunner().invoke(cli, [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    report = run("extract", first, second, "--rank", 32, "-o", adapter)
    run("bake", first, adapter, "-o", baked)
    run("verify", first, adapter, baked)
    state = torch.load(baked, weights_only=True)["state_dict"]
    changed = {key for key, value in base.items() if not torch.equal(value, tuned[key])}
    gone = sum(float((state[key].double() - tuned[key].double()).square().sum()) for key in changed)
    whole = sum(float((base[key].double() - tuned[key].double()).square().sum()) for key in changed)
    assert (gone / whole) ** 0.5 == pytest.approx(report["error"], rel=1e-3, abs=1e-5)
    assert all(torch.equal(state[key], value) for key, value in base.items() if key not in changed)
    assert len(load_file(adapter)) == 3 * len(changed)
