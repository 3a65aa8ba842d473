"""What doctor says of PEFT, against what PEFT does."""

import re
import warnings

import factories as make
import pytest
import torch

import loratools as lt
from tests.ops.doctoring import FAULTS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peers


def model():
    """A model with the weights that ``factories.LLAMA`` adapts, each called by itself."""
    root = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for path, (rows, columns) in make.LLAMA:
        *parents, leaf = path.split(".")
        owner = root
        for name in parents:
            if name not in owner._modules:
                owner.add_module(name, torch.nn.Module())
            owner = owner.get_submodule(name)
        layer = torch.nn.Linear(columns, rows, bias=False)
        layer.weight.data = torch.randn(rows, columns, generator=generator)
        owner.add_module(leaf, layer)
    return root


def works(path, deltas):
    """Whether PEFT loads a folder, and every weight with it is W + ΔW."""
    plain = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = peft.PeftModel.from_pretrained(model(), path)
            merged = loaded.merge_and_unload()
        except (RuntimeError, ValueError, re.error):
            return False
    return all(
        torch.allclose(
            merged.get_submodule(name).weight,
            plain.get_submodule(name).weight
            + torch.from_numpy(deltas[make.key_of("language_model", name)]).float(),
            atol=1e-5,
        )
        for name, _ in make.LLAMA
    )


def test_what_is_called_healthy_works(tmp_path):
    fine = ({}, {"ranks": {make.LLAMA[0][0]: 2}}, {"config": {"use_rslora": True}}, {"form": "named"})
    for number, options in enumerate(fine):
        made = make.peft(tmp_path / str(number), **options)
        assert lt.doctor(made.path, runtime="peft").ok
        assert works(made.path, made.deltas)


@pytest.mark.parametrize(
    "code",
    [
        *("prefix-doubled", "prefix-missing", "prefix-wrapped", "adapter-name", "rank-contradicts"),
        *("targets-contradict", "method-contradicts", "dora-contradicts", "pattern-invalid"),
    ],
)
def test_what_is_called_an_error_does_not_work(code, tmp_path):
    path, options = FAULTS[code](tmp_path / "adapter")
    report = lt.doctor(path, runtime="peft", **options)
    assert code in {finding.code for finding in report.findings}
    assert not report.ok
    assert not works(path, make.peft(tmp_path / "plain").deltas)


def test_a_pattern_whose_order_decides_changes_when_it_is_saved(tmp_path):
    path, _ = FAULTS["pattern-order"](tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model(), path)
    loaded.save_pretrained(tmp_path / "saved")
    before, after = (
        [module.scale for module in lt.load(each).modules.values()] for each in (path, tmp_path / "saved")
    )
    assert before != after
