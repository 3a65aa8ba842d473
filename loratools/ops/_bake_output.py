"""A bake that was planned, and writing it: to a draft, by this machine's threads or by an engine."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from loratools.errors import OptionError
from loratools.io.base import Base
from loratools.io.draft import Draft, ModelFile
from loratools.model import Adapter
from loratools.ops import _bake_run
from loratools.ops._bake_identity import identity
from loratools.ops._bake_lanes import Lanes
from loratools.ops._bake_run import Done, Meter, Options
from loratools.ops._bake_shards import ShardPlan
from loratools.ops._changes import Plan
from loratools.ops._outputs import within

if TYPE_CHECKING:
    from loratools.engine import Engine


class Planned(NamedTuple):
    """A bake that was checked and planned.

    Attributes:
        base: The checkpoint.
        adapters: The adapters.
        strengths: What each is multiplied by.
        plan: What changes.
        shards: How each file is written.
        options: How tensors are computed.
        container: Of the output.
        output: Its path.
        engine: Where the work is done; None for this machine's threads.
        replaced: Files of another model in the output's folder, which go.
    """

    base: Base
    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    plan: Plan
    shards: tuple[ShardPlan, ...]
    options: Options
    container: str
    output: str
    engine: Engine | None = None
    replaced: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the tensors' files, as good as known before they are written."""
        return sum(_bake_run.size_of(shard, self.options.store) for shard in self.shards)


class Result(NamedTuple):
    """What was written.

    Attributes:
        done: What became of the tensors.
        bytes: Size of all files of tensors.
        beside: Other files that were copied, relative to the folder.
        fresh_reason: Why a bake that should have been resumed started afresh; empty where it was resumed.
    """

    done: Done
    bytes: int
    beside: tuple[str, ...]
    fresh_reason: str


def write(planned: Planned, meter: Meter, *, overwrite: bool, resume: bool) -> Result:
    """Write the output, which has its name afterwards.

    Args:
        planned: What to write.
        meter: Told how many bytes are done.
        overwrite: Whether an existing output may be replaced.
        resume: Go on with an interrupted run, and keep what is done if this one is.

    Raises:
        LoraError: Nothing was written under the output's name.
    """
    draft = draft_of(planned, overwrite=overwrite, resume=resume)
    with draft:
        done = _filled(planned, draft, meter)
        beside = _completed(planned, draft)
        size = sum(os.path.getsize(draft.place(shard.name)) for shard in planned.shards)
    return Result(done, size, beside, draft.fresh_reason)


def draft_of(planned: Planned, *, overwrite: bool = False, resume: bool = False) -> Draft:
    """Where the output is made; nothing is done yet.

    Raises:
        OptionError: The output would lie inside the base's folder.
    """
    base = planned.base
    known = partial(
        identity, base, planned.adapters, planned.plan, planned.shards, planned.options, planned.engine
    )
    files = [shard.name for shard in planned.shards]
    if not base.folder:
        return ModelFile(
            planned.output, known, overwrite=overwrite, resume=resume, files=files, needed=planned.bytes
        )
    from loratools.io.model_folder import ModelFolder

    _refuse_inside(base, planned.output)
    return ModelFolder(
        planned.output,
        base,
        known,
        overwrite=overwrite,
        resume=resume,
        files=files,
        needed=planned.bytes,
        replaced=planned.replaced,
    )


def _filled(planned: Planned, draft: Draft, meter: Meter) -> Done:
    """Write the files of tensors."""
    if planned.engine is not None:
        from loratools.ops import _bake_plan

        return _bake_plan.run(planned.shards, planned.options, draft, planned.engine, meter)
    with Lanes(planned.shards, draft, planned.options, meter) as lanes:
        tensors = lanes.run()
    return Done(tensors, *lanes.taken)


def _completed(planned: Planned, draft: Draft) -> tuple[str, ...]:
    """Write what a folder has beside the tensors; the files that are copied, relative to it."""
    if not planned.base.folder:
        return ()
    from loratools.io.model_folder import ModelFolder
    from loratools.ops._bake_configs import write_configs

    assert isinstance(draft, ModelFolder)
    write_configs(planned.base, planned.shards, planned.plan, planned.options.store, draft.write_json)
    return draft.beside


def _refuse_inside(base: Base, output: str) -> None:
    """Refuse an output inside the base's folder, which would become a part of it.

    Raises:
        OptionError: It is.
    """
    if within(output, base.folder) and not within(base.folder, output):
        raise OptionError(
            "the output would lie inside the base model's folder", path=output, todo="Choose another place"
        )
