"""A conversion's stages where it is into a program's normal form: steps, what lies beside them, the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loratools.errors import OptionError
from loratools.formats import Document, Format
from loratools.io.base import Base
from loratools.model import EMPTY, Adapter, Layout, Module, Target
from loratools.ops import _normal, _normal_config, _normal_partners, _normal_steps, _normal_whole, _remarks
from loratools.ops._fit import Fitted, Misfit
from loratools.ops._host import Host
from loratools.ops._normal import Demand
from loratools.ops._normal_whole import Beside
from loratools.ops._regroup import Regrouped
from loratools.ops.results import Conversion, LedgerEntry, Normalised
from loratools.tensors import TensorRef

_LAYOUT = "peft"


# What models with tied weights have for both ends, by the last word of its path.
_TIED = {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared"}


class Normal(NamedTuple):
    """What a conversion did for a program's normal form.

    Attributes:
        runtime: The program's name, or empty where the conversion is for none.
        account: The modules that were changed.
        whole: Whole tensors to be written apart, by the base's keys.
    """

    runtime: str = ""
    account: tuple[Normalised, ...] = ()
    whole: Mapping[str, TensorRef] = EMPTY


def demanded(name: str, rank: int | None, *, bucket: bool, apart: bool) -> Demand | None:
    """What a name of ``--to`` asks for; None where it is a layout's that takes every rank and scale.

    Raises:
        OptionError: An option is given that only a program's normal form has.
    """
    runtime = _normal.runtime_of(name)
    if runtime is not None:
        return Demand(runtime, rank, bucket, apart)
    given = [option for option, there in (("--rank-bucket", bucket), ("--full-weights", apart)) if there]
    if given:
        raise OptionError(
            f"{' and '.join(given)} belong to a program's normal form, and {name} is a layout",
            expected=f"Known are {', '.join(_normal.names())}",
            todo="Name the program with --to",
        )
    return None


def steps(
    regrouped: Regrouped,
    adapter: Adapter,
    demand: Demand,
    form: Format,
    host: Host,
    base: Base | None,
    dtype: str,
) -> Regrouped:
    """The modules of an adapter as a program wants them: what it applies, at one rank and scale, with their partners.

    Args:
        regrouped: They at the layout's grain.
        adapter: That they are of.
        demand: The program, and the rank.
        form: Its layout.
        host: What the base's configuration says.
        base: The base model, or None.
        dtype: The store dtype of factors that change, or empty for each tensor's own.

    Raises:
        LayoutError: The rank is over the program's limit, or nothing tells the shape of a partner.
    """
    runtime = demand.runtime
    modules = [step.module for step in regrouped.steps]
    found = _normal_steps.refused(regrouped.steps, _normal.unheld(adapter, modules, runtime))
    rank = _normal_steps.rank_of(found, demand)
    if demand.rank is not None or demand.bucket or _normal_steps.is_uniform(runtime, form):
        found = [_normal_steps.padded(step, rank) for step in found]
    partners = _normal_partners.added(found, runtime, host, base, adapter.arch)
    found += partners
    if not runtime.holds("scales") and _normal_steps.is_uniform(runtime, form):
        found = _normal_steps.one_scale(found, dtype)
    notes = _notes(demand, rank, len(partners), host)
    return Regrouped(tuple(found), (*regrouped.notes, *notes))


def _notes(demand: Demand, rank: int, partners: int, host: Host) -> list[str]:
    """What somebody who serves the output should know."""
    runtime = demand.runtime
    notes = []
    if runtime.usual_rank and rank > runtime.usual_rank and runtime.option:
        room = next((each for each in runtime.ranks if each >= rank), rank)
        started = runtime.option.format(room)
        notes.append(
            f"{runtime.title} runs ranks up to {runtime.usual_rank} unless it is started with {started}"
        )
    if partners:
        notes.append(f"{partners} modules of zeros were added, which {runtime.title} wants beside the others")
    if runtime.every_layer and not host.layers:
        notes.append(
            f"{runtime.title} leaves out targets that any layer lacks; how many layers the model has, --base would tell"
        )
    return notes


def beside(
    adapter: Adapter,
    fitted: Sequence[Fitted],
    misfits: list[Misfit],
    goal: Layout,
    form: Format,
    demand: Demand | None,
    base: Base | None,
) -> tuple[dict[str, TensorRef], list[Misfit], Beside]:
    """What lies beside the factors: tensors of no module that have a place, what has none, and what is written apart.

    Args:
        adapter: At the layout's grain.
        fitted: What is written of its modules.
        misfits: What these lack a place for.
        goal: The layout that is written.
        form: Its description.
        demand: The program, and whether whole tensors are written apart; None where the layout alone counts.
        base: The base model, or None.
    """
    if demand is None:
        kept, strangers = _remarks.extras(adapter, goal, form)
        return kept, [*misfits, *strangers], Beside({}, {}, ())
    extras = _normal_whole.of_extras(adapter, base, apart=demand.apart, title=demand.runtime.title)
    biases = _normal_whole.of_biases(fitted, base, misfits, apart=demand.apart)
    # The layout may have a place where PEFT's has one only for PEFT: llama.cpp's for norms.
    kept = {key: ref for key, ref in adapter.extras.items() if form.adopt(ref, adapter) is not None}
    strangers = [misfit for misfit in extras.misfits if not set(misfit.keys) & kept.keys()]
    found = Beside(
        {**extras.whole, **biases.whole}, {**extras.entries, **biases.entries}, (*biases.misfits, *strangers)
    )
    return kept, list(found.misfits), found


def tied(found: Beside, host: Host) -> tuple[str, ...]:
    """A note on whole tensors that a model has twice: PEFT parts the two, a program that loads the file does not."""
    names = _TIED & {key.removesuffix(".weight").rpartition(".")[2] for key in found.whole}
    if not host.tied or not names:
        return ()
    return (
        f"{min(names)} is both the embedding and the output layer of the model (tie_word_embeddings), and only one of "
        "them was trained: set tie_word_embeddings to false and store both before the whole tensors are loaded",
    )


def told(ledger: Sequence[LedgerEntry], fitted: Sequence[Fitted], found: Beside) -> tuple[LedgerEntry, ...]:
    """A ledger with what became of tensors beside the modules, and which factors have but zeros added."""
    longer = {
        ref.name
        for each in fitted
        if each.module is not None and (each.step.sources[0].rank or 0) < (each.module.rank or 0)
        if each.module.scale == each.step.sources[0].scale
        for ref in each.step.sources[0].factors.values()
    }
    padded = [
        entry._replace(fate="padded") if entry.key in longer and entry.fate == "folded" else entry
        for entry in ledger
    ]
    return tuple([found.entries.get(entry.key, entry) for entry in padded])


def configured(
    document: Document, form: Format, demand: Demand | None, host: Host, adapter: Adapter
) -> Document:
    """A document with a configuration that is made for the base, and for the program.

    Args:
        document: As the layout has it.
        form: The layout.
        demand: The program, or None.
        host: What the base's configuration says.
        adapter: What is written.
    """
    if host.config:
        document = form.for_base(document, host.config, host.layers)
    if demand is not None and form.name == _LAYOUT and document.config is not None:
        paths = [target.path for target in adapter.modules]
        document = document._replace(config=_normal_config.plain(document.config, paths))
    return document


def normal(
    demand: Demand | None,
    fitted: Sequence[Fitted],
    origins: Mapping[Target, Module],
    conversions: Sequence[Conversion],
    found: Beside,
) -> Normal:
    """The account of a conversion for a program; an empty one for none."""
    if demand is None:
        return Normal()
    return Normal(demand.runtime.name, _normal.account(fitted, origins, conversions), found.whole)
