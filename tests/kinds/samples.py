"""One module of every kind and form, beside ΔW by its definition, written out naively in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from loratools import kinds
from loratools.model import Module, Target
from loratools.tensors import TensorRef, from_torch

Array = np.ndarray
OUT, IN = 12, 8
KERNEL = (3, 3)


class Sample(NamedTuple):
    """A module, the base weight it is for, and what it does to it."""

    module: Module
    base: Array
    delta: Array


def ref(array: Array, dtype: torch.dtype = torch.float64) -> TensorRef:
    return from_torch("", torch.tensor(np.asarray(array), dtype=dtype))


def module_of(kind: str, arrays: dict[str, Array], scale: float, **fields: object) -> Module:
    factors = {
        role: ref(array, torch.int64 if array.dtype.kind == "i" else torch.float64)
        for role, array in arrays.items()
    }
    found = kinds.of_roles(factors)
    assert found is not None
    assert found.name == kind
    return Module(
        Target("model", "w"),
        kind,
        factors,
        scale=scale,
        rank=found.rank(factors),
        shape=found.shape(factors),
        **fields,  # type: ignore[arg-type]
    )


def _lora(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    up, down = rng.normal(size=(OUT, 3)), rng.normal(size=(3, IN))
    return module_of("lora", {"up": up, "down": down}, -0.5), -0.5 * up @ down


def _lora_conv(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    up, down = rng.normal(size=(OUT, 3, 1, 1)), rng.normal(size=(3, *base.shape[1:]))
    delta = 0.5 * np.einsum("or,riyx->oiyx", up[:, :, 0, 0], down)
    return module_of("lora", {"up": up, "down": down}, 0.5, op="conv"), delta


def _lora_mid(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    up, mid, down = (rng.normal(size=size) for size in ((OUT, 3, 1, 1), (3, 4, *KERNEL), (4, IN, 1, 1)))
    delta = 2.0 * np.einsum("ijkl,pi,jr->prkl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    return module_of("lora", {"up": up, "down": down, "mid": mid}, 2.0, op="conv"), delta


def _lora_diff(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    up, down, diff = rng.normal(size=(OUT, 2)), rng.normal(size=(2, IN)), rng.normal(size=(OUT, IN))
    return module_of("lora", {"up": up, "down": down, "diff": diff}, 0.25), 0.25 * up @ down + diff


def _sparse(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    module, delta = _lora_conv(rng, base)
    rows, columns, values = [1, 0, 11], [5, 70, 0], rng.normal(size=3)
    delta = delta.reshape(OUT, -1).copy()
    np.add.at(delta, (rows, columns), values)
    beside = {
        "bias_indices": ref(np.array([rows, columns]), torch.int16),
        "bias_values": ref(values),
        "bias_size": ref(np.array([OUT, IN * 9]), torch.int16),
    }
    return module._replace(factors={**module.factors, **beside}), delta.reshape(base.shape)


def _adalora(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    up, middle, down = rng.normal(size=(OUT, 3)), rng.normal(size=(3, 1)), rng.normal(size=(3, IN))
    module = module_of("adalora", {"up": up, "down": down, "lora_E": middle}, 0.5)
    return module, 0.5 * up @ np.diag(middle[:, 0]) @ down


def _bdlora(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    up, first, second = (
        rng.normal(size=(OUT, 4)),
        rng.normal(size=(2, IN // 2)),
        rng.normal(size=(2, IN // 2)),
    )
    nothing = np.zeros((2, IN // 2))
    arrays = {"up": up, "down_blocks": np.concatenate([first, second])}
    module = module_of("bdlora", arrays, 0.5, variant="blocks=2")._replace(shape=(OUT, IN))
    return module, 0.5 * up @ np.block([[first, nothing], [nothing, second]])


def _loha(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    one_a, one_b, two_a, two_b = (rng.normal(size=size) for size in ((OUT, 2), (2, IN), (OUT, 2), (2, IN)))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    arrays = dict(zip(names, (one_a, one_b, two_a, two_b), strict=True))
    return module_of("loha", arrays, 0.5), 0.5 * (one_a @ one_b) * (two_a @ two_b)


def _loha_tucker(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    arrays = {}
    parts = []
    for number in (1, 2):
        core, left, right = (
            rng.normal(size=(2, 2, *KERNEL)),
            rng.normal(size=(2, OUT)),
            rng.normal(size=(2, IN)),
        )
        arrays |= {f"hada_t{number}": core, f"hada_w{number}_a": left, f"hada_w{number}_b": right}
        parts.append(np.einsum("ijkl,jr,ip->prkl", core, right, left))
    return module_of("loha", arrays, 1.5), 1.5 * parts[0] * parts[1]


def _lokr(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    one, left, right = rng.normal(size=(3, 2)), rng.normal(size=(4, 2)), rng.normal(size=(2, 4))
    arrays = {"lokr_w1": one, "lokr_w2_a": left, "lokr_w2_b": right}
    return module_of("lokr", arrays, 0.5), 0.5 * np.kron(one, left @ right)


def _lokr_full(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    one, two = rng.normal(size=(3, 2)), rng.normal(size=(4, 4))
    return module_of("lokr", {"lokr_w1": one, "lokr_w2": two}, 1.0), np.kron(one, two)


def _lokr_both(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    sizes = {"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}
    arrays = {role: rng.normal(size=size) for role, size in sizes.items()}
    one, two = arrays["lokr_w1_a"] @ arrays["lokr_w1_b"], arrays["lokr_w2_a"] @ arrays["lokr_w2_b"]
    return module_of("lokr", arrays, 3.0), 3.0 * np.kron(one, two)


def _lokr_conv(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    one, two = rng.normal(size=(3, 2)), rng.normal(size=(4, 4, *KERNEL))
    return module_of("lokr", {"lokr_w1": one, "lokr_w2": two}, 1.0), np.kron(one[:, :, None, None], two)


def _lokr_tucker(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    one, core = rng.normal(size=(3, 2)), rng.normal(size=(2, 2, *KERNEL))
    left, right = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    arrays = {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": left, "lokr_w2_b": right}
    two = np.einsum("ijkl,ip,jr->prkl", core, left, right)
    return module_of("lokr", arrays, 0.5), 0.5 * np.kron(one[:, :, None, None], two)


def _full(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    diff = rng.normal(size=base.shape)
    return module_of("full", {"diff": diff}, 1.0), diff


def _glora(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    sizes = {"glora_a1": (IN, 2), "glora_a2": (2, IN), "glora_b1": (OUT, 1), "glora_b2": (1, IN)}
    arrays = {role: 0.3 * rng.normal(size=size) for role, size in sizes.items()}
    delta = arrays["glora_b1"] @ arrays["glora_b2"] + base @ arrays["glora_a1"] @ arrays["glora_a2"]
    return module_of("glora", arrays, 0.5), 0.5 * delta


def _glora_conv(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    sizes = {
        "glora_a1": (IN, 1, 1, 1),
        "glora_a2": (1, IN, 1, 1),
        "glora_b1": (OUT, 2, 1, 1),
        "glora_bm": (2, 2, *KERNEL),
        "glora_b2": (2, IN, 1, 1),
    }
    arrays = {role: rng.normal(size=size) for role, size in sizes.items()}
    flat = {role: array[:, :, 0, 0] for role, array in arrays.items()}
    added = np.einsum("ijkl,pi,jr->prkl", arrays["glora_bm"], flat["glora_b1"], flat["glora_b2"])
    through = np.einsum("oikl,ij->ojkl", base, flat["glora_a1"] @ flat["glora_a2"])
    return module_of("glora", arrays, 0.5), 0.5 * (added + through)


def _ia3_out(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    vector = rng.normal(size=(OUT, 1))
    module = module_of("ia3", {"ia3_weight": vector, "on_input": np.array(0.0)}, 1.0)
    return module, base * vector


def _ia3_in(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    vector = rng.normal(size=(1, IN, 1, 1))
    return module_of("ia3", {"ia3_weight": vector, "on_input": np.array(1.0)}, 1.0), base * vector


def _ia3_peft(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    vector = rng.normal(size=(1, IN))
    return module_of("ia3", {"ia3_l": vector}, 1.0), base * (vector - 1.0)


def _rotation(blocks: Array) -> Array:
    skew = blocks - blocks.T
    one = np.eye(len(blocks))
    return (one + skew) @ np.linalg.inv(one - skew)


def _block_diagonal(blocks: list[Array]) -> Array:
    size = len(blocks[0])
    whole = np.zeros((size * len(blocks),) * 2)
    for number, block in enumerate(blocks):
        whole[number * size : (number + 1) * size, number * size : (number + 1) * size] = block
    return whole


def _oft(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    blocks, rescale = 0.3 * rng.normal(size=(3, 4, 4)), rng.normal(size=(OUT, 1, 1, 1))
    turn = _block_diagonal([_rotation(block) for block in blocks])
    changed = rescale * (turn.T @ base.reshape(OUT, -1)).reshape(base.shape)
    return module_of("oft", {"oft_blocks": blocks, "rescale": rescale}, 1.0), changed - base


def _oft_constrained(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    blocks = rng.normal(size=(3, 4, 4))
    alpha = 0.01
    norm = np.sqrt(sum(((block - block.T) ** 2).sum() for block in blocks))
    turn = _block_diagonal([_rotation(block * alpha * OUT / norm) for block in blocks])
    return module_of("oft", {"oft_blocks": blocks}, 1.0, alpha=alpha), turn.T @ base - base


def _oft_diag(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    turns = np.stack([_rotation(block) for block in rng.normal(size=(3, 4, 4))])
    return module_of("oft", {"oft_diag": turns}, 1.0), _block_diagonal(list(turns)).T @ base - base


def _boft(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    steps, count, size = 2, OUT // 2, 2
    blocks = rng.normal(size=(steps, count, size, size))
    changed = base
    for step in range(steps):
        turn = _block_diagonal([_rotation(block) for block in blocks[step]])
        stride = 2**step
        # Row 2·stride·c + stride·g + k of the weight is row 2·stride·c + 2·k + g of the step.
        order = [
            2 * stride * chunk + stride * half + place
            for chunk in range(OUT // (2 * stride))
            for place in range(stride)
            for half in range(2)
        ]
        exchange = np.eye(OUT)[order]
        changed = exchange.T @ turn @ exchange @ changed
    return module_of("oft", {"oft_blocks": blocks}, 1.0), changed - base


def _oft_peft(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    packed = 0.2 * rng.normal(size=(2, 6))
    turns = []
    for row in packed:
        skew = np.zeros((4, 4))
        skew[np.triu_indices(4, 1)] = row
        skew = skew - skew.T
        powers = [np.linalg.matrix_power(skew, power) for power in range(5)]
        turns.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4])
    return module_of("oft", {"oft_r": packed}, 1.0), base @ _block_diagonal(turns).T - base


def _softmax(values: Array) -> Array:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def _vera(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    first, second = rng.normal(size=(3, IN + 2)), rng.normal(size=(OUT + 4, 3))
    lambda_b, lambda_d = rng.normal(size=OUT), rng.normal(size=3)
    arrays = {"vera_lambda_b": lambda_b, "vera_lambda_d": lambda_d, "vera_a": first, "vera_b": second}
    delta = np.diag(lambda_b) @ second[:OUT] @ np.diag(lambda_d) @ first[:, :IN]
    return module_of("vera", arrays, 1.0), delta


def _miss_of(block: Array) -> tuple[Module, Array]:
    rank, width = block.shape
    delta = np.array([[block[i % rank, o % width] for i in range(IN)] for o in range(OUT)])
    return module_of("miss", {"miss_block": block}, 1.0), delta


def _miss(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    return _miss_of(rng.normal(size=(3, OUT)))


def _miss_mini(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    return _miss_of(rng.normal(size=(4, 3)))


def _miss_bat(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    blocks, delta = 0.3 * rng.normal(size=(OUT // 4, 4, 4)), np.zeros((OUT, IN))
    for row in range(0, OUT, 4):
        for column in range(0, IN, 4):
            block = blocks[row // 4]
            delta[row : row + 4, column : column + 4] = (
                base[row : row + 4, column : column + 4] @ block + block
            )
    return module_of("miss", {"miss_block": blocks}, 1.0), delta


def _stretch(logits: Array, bank: Array) -> Array:
    """The mixture of the two vectors with the largest logits."""
    chosen = np.argsort(-logits)[:2]
    return _softmax(logits[chosen]) @ bank[chosen]


def _vblora(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    bank, first, second = (rng.normal(size=size) for size in ((5, 4), (3, IN // 4, 5), (OUT // 4, 3, 5)))
    arrays = {"vblora_bank": bank, "vblora_logits_a": first, "vblora_logits_b": second}
    down = np.array([np.concatenate([_stretch(logits, bank) for logits in row]) for row in first])
    up = np.concatenate([np.array([_stretch(logits, bank) for logits in tile]).T for tile in second])
    return module_of("vblora", arrays, 1.0), up @ down


def _vblora_topk(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    bank = rng.normal(size=(5, 4))
    arrays: dict[str, Array] = {"vblora_bank": bank}
    sides = []
    for side, size in (("a", (3, IN // 4, 3)), ("b", (OUT // 4, 3, 3))):
        indices, weights = rng.integers(0, 5, size=size), rng.uniform(size=size)
        weights /= weights.sum(axis=-1, keepdims=True)
        arrays |= {f"vblora_indices_{side}": indices, f"vblora_weights_{side}": weights[..., :-1]}
        sides.append(np.einsum("ijk,ijkl->ijl", weights, bank[indices]))
    down, up = sides[0].reshape(3, IN), sides[1].transpose(0, 2, 1).reshape(OUT, 3)
    return module_of("vblora", arrays, 1.0), up @ down


def _unilora(rng: np.random.Generator, base: Array) -> tuple[Module, Array]:
    theta = rng.normal(size=7)
    arrays: dict[str, Array] = {"unilora_theta": theta}
    sides = []
    for side, size in (("a", (3, IN)), ("b", (OUT, 3))):
        indices, scales = rng.integers(0, 7, size=size), rng.uniform(size=size)
        arrays |= {f"unilora_indices_{side}": indices, f"unilora_scales_{side}": scales}
        sides.append(theta[indices] * scales)
    return module_of("unilora", arrays, 1.0), sides[1] @ sides[0]


LINEAR: dict[str, Callable[[np.random.Generator, Array], tuple[Module, Array]]] = {
    "lora": _lora,
    "lora-diff": _lora_diff,
    "adalora": _adalora,
    "bdlora": _bdlora,
    "loha": _loha,
    "lokr": _lokr,
    "lokr-full": _lokr_full,
    "lokr-both": _lokr_both,
    "full": _full,
    "glora": _glora,
    "ia3-out": _ia3_out,
    "ia3-peft": _ia3_peft,
    "oft-constrained": _oft_constrained,
    "oft-diag": _oft_diag,
    "boft": _boft,
    "oft-peft": _oft_peft,
    "vera": _vera,
    "miss": _miss,
    "miss-mini": _miss_mini,
    "miss-bat": _miss_bat,
    "vblora": _vblora,
    "vblora-topk": _vblora_topk,
    "unilora": _unilora,
}
CONV: dict[str, Callable[[np.random.Generator, Array], tuple[Module, Array]]] = {
    "lora-conv": _lora_conv,
    "lora-mid": _lora_mid,
    "sparse": _sparse,
    "loha-tucker": _loha_tucker,
    "lokr-conv": _lokr_conv,
    "lokr-tucker": _lokr_tucker,
    "full-conv": _full,
    "glora-conv": _glora_conv,
    "ia3-in": _ia3_in,
    "oft": _oft,
}
NAMES = [*LINEAR, *CONV]


def sample(name: str, seed: int = 0) -> Sample:
    """The sample of this name."""
    rng = np.random.default_rng(seed)
    make = LINEAR.get(name) or CONV[name]
    base = rng.normal(size=(OUT, IN) if name in LINEAR else (OUT, IN, *KERNEL))
    return Sample(*_ordered(make(rng, base), base))


def _ordered(made: tuple[Module, Array], base: Array) -> tuple[Module, Array, Array]:
    return made[0], base, made[1]
