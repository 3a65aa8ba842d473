"""The modules of an adapter at one rank and one scale, for programs that read both from one configuration.

Padding adds zero columns to ``up`` and zero rows to ``down``, which leaves every bit of ΔW. A scale of another module
goes into the factors: powers of two exactly, what is left of others with one rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools.archs._experts import is_experts
from loratools.errors import LayoutError, LoraError
from loratools.formats import Format
from loratools.model import Module
from loratools.ops import _scale
from loratools.ops._normal import Demand
from loratools.ops._regroup import Step
from loratools.runtimes import Runtime
from loratools.tensors import DTYPES, LazySource, TensorRef

if TYPE_CHECKING:
    import torch

# Along which axes the rank lies.
_AXES: Mapping[str, Mapping[str, int]] = {"lora": {"up": 1, "down": 0}, "experts": {"up": 2, "down": 1}}


def is_uniform(runtime: Runtime, form: Format) -> bool:
    """Whether all modules have to be of one rank: it divides alpha, or says where factors end."""
    if not (runtime.holds("ranks") and runtime.holds("layer_ranks")):
        return True
    # A layout that states one alpha for the whole file lets every module divide it by its own rank.
    return not runtime.holds("scales") and form.alpha != "file"


def refused(steps: Sequence[Step], why: Mapping[str, str]) -> list[Step]:
    """Steps of which those that the program does not apply are problems.

    Args:
        steps: Of an adapter.
        why: By target as text, what it does not hold.
    """
    found = []
    for step in steps:
        # Experts in another style are judged as they are now.
        judged = step.module if is_experts(step.module.target.path) else step.sources[0]
        reason = why.get(str(judged.target)) if step.problem is None else None
        problem = LayoutError(f"it has no place for {reason}") if reason else step.problem
        found.append(step._replace(problem=problem))
    return found


def rank_of(steps: Sequence[Step], demand: Demand) -> int:
    """The one rank of all modules, a count; 0 where no module has a rank.

    Raises:
        LayoutError: It is over the program's last limit.
    """
    ranks = [step.module.rank or 0 for step in steps if step.problem is None]
    rank = max([*ranks, demand.rank or 0], default=0)
    provided = demand.runtime.ranks
    if provided and rank > provided[-1]:
        over = [str(step.module.target) for step in steps if (step.module.rank or 0) > provided[-1]]
        raise LayoutError(
            f"{demand.runtime.title} runs ranks up to {provided[-1]}, not {rank}",
            keys=over,
            todo=f"Cut them with --rank {provided[-1]} or less",
        )
    if not demand.bucket or not rank:
        return rank
    return next((each for each in provided if each >= rank), 1 << (rank - 1).bit_length())


def at_one_rank(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Steps whose modules have the highest rank of all, with zeros for the directions that the others lack."""
    rank = max((step.module.rank or 0 for step in steps if step.problem is None), default=0)
    return tuple(padded(step, rank) for step in steps)


def padded(step: Step, rank: int) -> Step:
    """A step whose module has a rank, with zeros for the directions that it lacks."""
    module = step.module
    axes = _AXES.get(module.kind)
    if step.problem is not None or axes is None or not module.rank or module.rank >= rank:
        return step
    factors = {
        role: _with_zeros(ref, axes[role], rank) if role in axes else ref
        for role, ref in module.factors.items()
    }
    return step._replace(module=module._replace(factors=factors, rank=rank, alpha=None, alpha_tensor=None))


def _with_zeros(ref: TensorRef, axis: int, size: int) -> TensorRef:
    """A tensor that goes on with zeros along an axis."""
    shape = (*ref.shape[:axis], size, *ref.shape[axis + 1 :])

    def load() -> torch.Tensor:
        import torch

        whole = torch.zeros(shape, dtype=getattr(torch, DTYPES[ref.dtype].torch))
        whole.narrow(axis, 0, ref.shape[axis]).copy_(ref.load())
        return whole

    return TensorRef(ref.name, shape, ref.dtype, LazySource(load))


def one_scale(steps: Sequence[Step], dtype: str) -> list[Step]:
    """Steps whose modules all have the scale that most of them have.

    Args:
        steps: Of an adapter.
        dtype: The store dtype of factors that change, or empty for each tensor's own.
    """
    scales = Counter(step.module.scale for step in steps if step.problem is None and step.module.rank)
    # A scale of 0 would take every other module's ΔW away: such a module gets zeros for factors.
    scale = max((each for each in scales if each), key=lambda each: (scales[each], -abs(each)), default=1.0)
    return [_restated(step, scale, dtype) for step in steps]


def _restated(step: Step, scale: float, dtype: str) -> Step:
    module: Module = step.module
    if step.problem is not None or not module.rank or module.scale == scale:
        return step
    try:
        found, rounded = _scale.restated(module, scale, dtype)
    except LoraError as error:
        return step._replace(problem=error)
    return step._replace(module=found, rounded=step.rounded or rounded)
