"""Lossless rows of the table: what another row or given layers choose, or look-up alone, drafts for the full SLM."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from omegaconf import DictConfig

from dynprune.evaluation.latency import TimedRow
from dynprune.slm.speculative import Drafting, speculate
from dynprune.stages.rows import Row
from dynprune.stages.run import Run


def lossless_rows(run: Run, rows: Sequence[Row]) -> list[Row]:
    """The rows that ``evaluation.lossless`` asks for.

    Args:
        run: The run.
        rows: The other rows, the original first, whose configurations may draft.
    """
    return [_lossless_row(name, settings, rows) for name, settings in run.config.evaluation.lossless.items()]


def timed_row(row: Row) -> TimedRow:
    """How a row of the table is timed."""
    return TimedRow(row.choose) if row.drafting is None else TimedRow(row.choose, partial(speculate, drafting=row.drafting))


def _lossless_row(name: str, settings: DictConfig, rows: Sequence[Row]) -> Row:
    drafting = Drafting(settings.lookup, settings.draft_tokens, settings.min_probability)
    source = _source(f"evaluation.lossless.{name}", settings, rows)
    return replace(
        source,
        name=f"lossless-{name}",
        origin=f"{source.origin} {drafting}",
        drafting=drafting,
        # It has the answers of the unpruned SLM: no point of the curve of the row that drafts.
        curve=None,
        seed=None,
        timed=True,
    )


def _source(key: str, settings: DictConfig, rows: Sequence[Row]) -> Row:
    """The row whose configurations draft."""
    original, *pruned = rows
    layers = settings.pruned_layers
    if not layers:
        if not settings.lookup:
            raise ValueError(
                f"{key} has nothing that drafts; set {key}.lookup=true, or {key}.pruned_layers=[2,5,8] for example"
            )
        return original
    if not isinstance(layers, str):
        configuration = sorted({layers} if isinstance(layers, int) else set(layers))
        return replace(original, choose=lambda query: configuration, origin=str(configuration))
    by_name = {row.name: row for row in pruned}
    if layers not in by_name:
        raise ValueError(
            f"{key}.pruned_layers={layers} is no row of the table; allowed: null, layers such as [2,5,8], or one of "
            f"{', '.join(by_name)}"
        )
    return by_name[layers]
