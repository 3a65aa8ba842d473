"""Extracting: what comes back, by which rank rule, in which layout, and what is said of the rest."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import OptionError
from loratools.io.base import keys_of
from loratools.ops import _extract_batched
from loratools.ops._extract_jobs import work
from loratools.ops._extract_options import options
from loratools.ops._extract_plan import compare
from loratools.ops._extract_side import sides
from loratools.ops._extract_tensor import extract_tensor
from loratools.ops.extract import default_output, extract
from tests.ops import checkpoints as make

RULES = {"rank": None, "energy": None, "ratio": None, "error": None, "size": None}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = make.llama()
    return make.save(base, tmp_path / "base.safetensors"), make.save(
        make.tuned(base), tmp_path / "tuned.safetensors"
    )


def differences(pair: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    """Every difference that is not zero, in float64, by the module's path."""
    from safetensors.torch import load_file

    base, tuned = (load_file(path) for path in pair)
    found = {key.removesuffix(".weight"): tuned[key].double() - base[key].double() for key in base}
    return {path: delta for path, delta in found.items() if delta.any()}


def best_error(delta: torch.Tensor, rank: int) -> float:
    sigma = torch.linalg.svdvals(delta.flatten(1))
    return float(torch.linalg.norm(sigma[rank:]) / torch.linalg.norm(sigma))


def test_a_planted_product_comes_back_to_rounding(pair) -> None:
    found, report = extract(*pair, rank=3)
    assert found is not None
    expected = differences(pair)
    assert {target.path for target in found.modules} == expected.keys()
    for target, module in found.modules.items():
        assert module.rank == 3
        assert module.alpha == 3.0
        assert module.scale == 1.0
        delta = expected[target.path]
        off = float((module.delta().double() - delta).norm() / delta.norm())
        assert off <= best_error(delta, 3) + 1e-6
    assert (
        report.unchanged == len(make.llama()) - 1 - 1 - len(expected) - 1
    )  # an embedding, a norm and a bias
    assert report.error == pytest.approx(report.optimum, abs=1e-6)
    assert not report.left_out


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    rank=st.integers(1, 6),
    shape=st.sampled_from([(9, 7), (7, 9), (6, 4, 3, 3), (5, 8, 1, 1), (8, 6, 3)]),
)
def test_no_matrix_of_the_rank_is_closer(
    seed: int, rank: int, shape: tuple[int, ...], tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("extract")
    base = {"conv.weight": make.random(shape, seed), "conv.bias": make.random(shape[:1], seed + 1)}
    tuned = {**base, "conv.weight": base["conv.weight"] + make.random(shape, seed + 2)}
    paths = make.save(base, folder / "a.safetensors"), make.save(tuned, folder / "b.safetensors")
    found, report = extract(*paths, rank=rank)
    assert found is not None
    delta = differences(paths)["conv"]
    (module,) = found.modules.values()
    off = float((module.delta().double().reshape(shape) - delta).norm() / delta.norm())
    best = best_error(delta, rank)
    assert off <= 1.001 * best + 1e-6
    assert report.modules[0].error == pytest.approx(off, abs=1e-5)
    assert report.modules[0].optimum <= best + 1e-6
    up, down = module.factors["up"], module.factors["down"]
    assert up.shape == (shape[0], module.rank, *(1,) * len(shape[2:]))
    assert down.shape == (module.rank, *shape[1:])
    assert float(up.load().norm()) == pytest.approx(float(down.load().norm()), rel=1e-5)


def test_adding_what_was_extracted_gives_the_tuned_weights(pair) -> None:
    found, _ = extract(*pair, rank=24)
    assert found is not None
    expected = differences(pair)
    for target, module in found.modules.items():
        assert torch.allclose(module.delta().double(), expected[target.path], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "value"), [("energy", 0.8), ("error", 0.3), ("ratio", 0.3), ("ratio", 4.0), ("rank", 2)]
)
def test_every_rule_keeps_exactly_what_it_asks_for(rule: str, value: float, pair) -> None:
    _, report = extract(*pair, **{rule: value})
    expected = differences(pair)
    for module in report.modules:
        sigma = torch.linalg.svdvals(expected[module.target])
        kept = torch.cumsum(sigma**2, 0) / (sigma**2).sum()
        wanted = {
            "rank": 2,
            "energy": int((kept < 0.8).sum()) + 1,
            "error": int((1 - kept > 0.09).sum()) + 1,
            "ratio": int((sigma > sigma[0] * (value if value < 1 else 1 / value)).sum()),
        }[rule]
        assert module.rank == wanted
        assert module.energy == pytest.approx(float(kept[wanted - 1]), abs=1e-5)
    assert 1 - report.error**2 == pytest.approx(report.energy, abs=1e-9)


def test_limits_and_a_rank_of_its_own_for_kernels(tmp_path: Path) -> None:
    base = {"a.weight": make.random((8, 8), 1), "b.weight": make.random((8, 4, 3, 3), 2)}
    tuned = {key: value + make.random(tuple(value.shape), 7) for key, value in base.items()}
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")

    def ranks(**options) -> dict[str, int | None]:
        return {module.target: module.rank for module in extract(*paths, **options)[1].modules}

    assert ranks(rank=5, conv_rank=2) == {"a": 5, "b": 2}
    assert ranks(energy=0.999, max_rank=4) == {"a": 4, "b": 4}
    assert ranks(energy=0.01, min_rank=3) == {"a": 3, "b": 3}
    assert ranks(rank=5, conv_rank=0) == {"a": 5}
    (left,) = extract(*paths, rank=5, conv_rank=0)[1].left_out
    assert (left.key, "--conv-rank" in left.why) == ("b.weight", True)
    assert left.norm == pytest.approx(float((tuned["b.weight"] - base["b.weight"]).norm()), rel=1e-5)


@pytest.mark.parametrize("budget", [4000, 7000, 20000])
def test_a_size_is_spent_where_it_keeps_most(budget: int, tmp_path: Path) -> None:
    base = make.llama()
    tuned = {
        key: value + make.random(tuple(value.shape), at, 0.5**at) if "_proj.weight" in key else value
        for at, (key, value) in enumerate(base.items())
    }
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    output = tmp_path / "out"
    _, report = extract(*paths, output, size=budget)
    written = sum(file.stat().st_size for file in output.iterdir())
    assert report.bytes == written <= budget
    _, even = extract(*paths, rank=min(report.ranks))
    assert report.error <= even.error + 1e-9
    # No module could give a rank to another one of the same cost and gain by it.
    expected = differences(paths)
    gains = {
        module.target: torch.linalg.svdvals(expected[module.target]) ** 2 / sum(module.shape)
        for module in report.modules
    }
    least = (
        min(
            float(gains[module.target][module.rank - 1])
            for module in report.modules
            if module.rank and module.rank > 1
        )
        if any((module.rank or 0) > 1 for module in report.modules)
        else math.inf
    )
    for module in report.modules:
        if module.rank is not None and module.rank < min(module.shape):
            cost = 4 * sum(module.shape)
            assert float(gains[module.target][module.rank]) <= least or budget - written < cost + 200


def test_a_size_that_holds_nothing_is_refused(pair, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not hold rank 1"):
        extract(*pair, tmp_path / "out", size="1KB")
    assert not (tmp_path / "out").exists()


def test_biases_and_norms_only_on_request(tmp_path: Path) -> None:
    base = make.llama()
    tuned = {key: value + (0.5 if value.dim() == 1 else 0) for key, value in make.tuned(base).items()}
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    _, report = extract(*paths, rank=2)
    left = {each.key: each for each in report.left_out}
    assert left.keys() == {key for key, value in base.items() if value.dim() == 1}
    assert left["model.layers.0.self_attn.k_proj.bias"].norm == pytest.approx(0.5 * math.sqrt(12), rel=1e-5)
    assert all("--full-small" in each.why for each in left.values())

    extract(*paths, tmp_path / "out", rank=2, full_small=True)
    found = lt.load(tmp_path / "out")
    norm = "base_model.model.model.layers.0.input_layernorm.weight"
    assert torch.equal(found.extras[norm].load(), tuned["model.layers.0.input_layernorm.weight"])
    assert found.config["modules_to_save"] == ["input_layernorm"]
    # PEFT keeps the biases of modules that it wraps under the wrapped module's name, and loads no others.
    bias = "base_model.model.model.layers.0.self_attn.k_proj.base_layer.bias"
    assert torch.equal(found.extras[bias].load(), tuned["model.layers.0.self_attn.k_proj.bias"])
    assert found.config["bias"] == "all"
    assert "lora_bias" not in found.config
    assert extract(*paths, rank=2, full_small=True)[1].left_out == ()


def test_embeddings_only_on_request(tmp_path: Path) -> None:
    base = make.llama()
    tuned = make.tuned(base, only="embed_tokens")
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    with pytest.raises(OptionError, match="--full-small and --embeddings"):
        extract(*paths, rank=3)
    extract(*paths, tmp_path / "out", rank=3, embeddings=True)
    (module,) = lt.load(tmp_path / "out").modules.values()
    assert module.op == "embedding"
    delta = tuned["model.embed_tokens.weight"] - base["model.embed_tokens.weight"]
    assert torch.allclose(module.delta().t(), delta, atol=1e-5) or torch.allclose(
        module.delta(), delta, atol=1e-5
    )


def test_the_folder_of_peft_is_complete(pair, tmp_path: Path) -> None:
    _, report = extract(*pair, tmp_path / "out", energy=0.9, dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pair[0])
    assert config["peft_type"] == "LORA"
    ranks = {module.target: module.rank for module in report.modules}
    written = {target.path: module for target, module in lt.load(tmp_path / "out").modules.items()}
    assert {path: module.rank for path, module in written.items()} == ranks
    assert all(module.scale == 1.0 for module in written.values())
    assert {ref.dtype for module in written.values() for ref in module.factors.values()} == {"BF16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keep_is_the_bases_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {key: value.to(dtype) for key, value in make.llama().items()}
    paths = make.save(base, tmp_path / "a.ckpt"), make.save(make.tuned(base), tmp_path / "b.safetensors")
    found, report = extract(*paths, rank=1)
    assert found is not None
    assert report.dtype == {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    assert {ref.dtype for module in found.modules.values() for ref in module.factors.values()} == {
        report.dtype
    }


def test_small_differences_survive_half_precision_or_are_told(tmp_path: Path) -> None:
    """σ of 1e-5 becomes √σ on both sides; where even that is too small, the report says so."""
    base = {"m.weight": torch.zeros(32, 32)}
    for scale, told in ((1e-5, False), (1e-12, True)):
        tuned = {"m.weight": scale * make.low_rank((32, 32), 2, 5)}
        paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
        found, report = extract(*paths, rank=2, dtype="float16")
        assert found is not None
        assert any("float32 keeps them" in note for note in report.notes) is told
        (module,) = found.modules.values()
        off = (module.delta() - tuned["m.weight"]).norm() / tuned["m.weight"].norm()
        assert (float(off) < 2e-3) is not told
    found, report = extract(*paths, rank=2, dtype="bfloat16")
    assert not report.notes


def test_patterns_and_components_choose(pair, tmp_path: Path) -> None:
    def paths(**options) -> set[str]:
        return {module.target for module in extract(*pair, rank=1, **options)[1].modules}

    attention = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}
    assert paths(include=["self_attn"]) == attention
    assert paths(exclude=["mlp", "k_proj"]) == {"model.layers.0.self_attn.q_proj"}
    assert paths(components=["language_model"]) > attention
    with pytest.raises(OptionError, match="no component 'denoiser'"):
        extract(*pair, rank=1, components=["denoiser"])
    with pytest.raises(OptionError, match="no regular expression"):
        extract(*pair, rank=1, include=["("])


def test_one_rule_and_one_only(pair) -> None:
    for given_rules in ({}, {"rank": 4, "energy": 0.5}):
        with pytest.raises(OptionError, match="Exactly one of rank"):
            extract(*pair, **given_rules)
    for wrong in (
        {"rank": 0},
        {"energy": 1.5},
        {"error": 0.0},
        {"ratio": -1.0},
        {"size": 0},
        {"size": "much"},
    ):
        with pytest.raises(OptionError):
            extract(*pair, **wrong)


def test_results_do_not_depend_on_threads(pair, tmp_path: Path) -> None:
    for threads in (1, 3):
        extract(*pair, tmp_path / str(threads), rank=2, threads=threads, svd="randomized", seed=5)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("1", "3"))
    assert one == other


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_batches_change_nothing_but_rounding(batch: int, tmp_path: Path) -> None:
    shapes = [(12, 9)] * 5 + [(9, 12)] * 2 + [(6, 4, 3, 3)]
    base = {f"m{at}.weight": make.random(shape, at) for at, shape in enumerate(shapes)}
    base["m0.bias"] = make.random((12,), 50)
    tuned = {
        key: value + make.random(tuple(value.shape), 90 + at) for at, (key, value) in enumerate(base.items())
    }
    tuned["m1.weight"] = base["m1.weight"]
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    asked = options(
        {**RULES, "rank": 3},
        **{
            "max_rank": None,
            "min_rank": 1,
            "conv_rank": None,
            "components": None,
            "include": (),
            "exclude": (),
        },
        **{
            "dtype": "keep",
            "svd": "auto",
            "tolerance": 1e-3,
            "seed": 0,
            "embeddings": False,
            "full_small": True,
        },
    )
    own, other = sides(keys_of(paths[0]), keys_of(paths[1]), None)
    jobs = work(compare(own, other, asked), asked, replaces=False).jobs
    single = {found.number: found for found in map(extract_tensor, jobs)}
    together = {found.number: found for found in _extract_batched.run(jobs, "cpu", batch=batch)}
    assert together.keys() == single.keys()
    for number, found in single.items():
        again = together[number]
        assert again.norm == pytest.approx(found.norm, rel=1e-6)
        if (
            found.up is not None
            and found.down is not None
            and again.up is not None
            and again.down is not None
        ):
            assert torch.allclose(again.up.t() @ again.down, found.up.t() @ found.down, atol=1e-5)
        else:
            assert found.up is again.up is None


def test_a_dry_run_writes_nothing_and_says_how_much(pair, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    found, planned = extract(*pair, tmp_path / "out", rank=2, dry_run=True)
    assert found is None
    assert sorted(tmp_path.iterdir()) == before
    assert planned.estimate is not None
    assert planned.estimate.seconds > 0
    assert planned.estimate.written == planned.bytes
    _, done = extract(*pair, tmp_path / "out", rank=2, exclude=["lm_head"])
    # All matrices are planned for; the head did not change and is not written.
    assert {module.target for module in planned.modules} == {module.target for module in done.modules} | {
        "lm_head"
    }
    assert planned.bytes > done.bytes
    _, sized = extract(*pair, tmp_path / "again", size=9000, dry_run=True)
    assert 0 < sized.bytes <= 9000


@pytest.mark.parametrize(
    ("rule", "tag"), [({"rank": 32}, "r32"), ({"energy": 0.95}, "e95"), ({"size": "20 MB"}, "20MB")]
)
def test_an_output_is_named_after_the_tuned_checkpoint(rule: dict, tag: str, pair, tmp_path: Path) -> None:
    assert default_output(pair[1], **rule) == f"tuned-lora-{tag}"
    assert default_output(pair[1], to="kohya", **rule) == f"tuned-lora-{tag}.safetensors"
    folder = make.shard(make.llama(), tmp_path / "my.model")
    assert default_output(folder, **rule) == f"my.model-lora-{tag}"


_MEMORY = """
import resource, sys
from loratools.ops.extract import extract
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
extract(*sys.argv[1:3], sys.argv[5], rank=2, threads=1)
before = peak()
extract(*sys.argv[3:5], sys.argv[6], rank=2, threads=1)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's own")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    paths = []
    for count in (8, 48):
        base = {f"m.{at}.weight": make.random((1024, 512), at) for at in range(count)}
        tuned = {key: make.random((1024, 512), 99 + at) for at, key in enumerate(base)}
        paths.append(make.save(base, tmp_path / f"a{count}.safetensors"))
        paths.append(make.save(tuned, tmp_path / f"b{count}.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, *paths, tmp_path / "out8", tmp_path / "out48"],
        capture_output=True,
        text=True,
        check=True,
    )
    # 40 matrices more, of 2 MB on either side, are 160 MB.
    assert int(done.stdout) < 24_000
