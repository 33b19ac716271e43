"""Running test queries without loss: drafts, by the pruned SLM or looked up, that the full SLM verifies."""

import logging
from collections.abc import Iterator, Sequence

from dynprune.data.prompts import prompt_tokens
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Sample
from dynprune.metrics.scores import all_scores
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner
from dynprune.slm.speculative import Drafting, is_near_tie, speculative_generate

log = logging.getLogger(__name__)


def run_lossless(
    slm: SLM,
    pruner: LayerPruner,
    queries: Sequence[Query],
    configurations: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafting: Drafting,
) -> Iterator[Sample]:
    """Generates and scores the full SLM's answer to each query.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        queries: The queries.
        configurations: For each query the layers that the drafting SLM leaves out.
        max_new_tokens: Limit of each output, stop token included.
        drafting: How to draft.

    Yields:
        A sample for each query, in their order; its configuration is empty, since no layer is missing from the output.
    """
    for query, configuration in zip(queries, configurations, strict=True):
        prompt = prompt_tokens(slm.tokenizer, query)
        said = speculative_generate(slm, pruner, prompt, configuration, max_new_tokens, drafting)
        output = slm.decode(said.token_ids)
        yield Sample(
            id=query.id,
            pruned_layers=(),
            output=output,
            token_ids=said.token_ids,
            truncated=said.truncated,
            scores=all_scores(output, query),
            drafts={
                "passes": said.passes,
                "draft_passes": said.draft_passes,
                "proposed": said.proposed,
                "accepted": said.accepted,
            },
        )


def count_differences(
    slm: SLM, pruner: LayerPruner, queries: Sequence[Query], samples: Sequence[Sample], originals: Sequence[Sample]
) -> tuple[int, int]:
    """Checks that samples have the outputs of the full SLM.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        queries: The queries.
        samples: A lossless sample for each.
        originals: The full SLM's sample for each.

    Returns:
        How many differ where two tokens are equally likely but for rounding, and how many where they are not: there the
        drafts have changed the output, and the log says which.
    """
    near_ties, unexplained = 0, 0
    for query, sample, original in zip(queries, samples, originals, strict=True):
        if sample.token_ids == original.token_ids:
            continue
        if is_near_tie(slm, pruner, prompt_tokens(slm.tokenizer, query), sample.token_ids, original.token_ids):
            near_ties += 1
            continue
        unexplained += 1
        log.error(
            "drafts changed the answer to query %s from %r to %r, which no rounding explains; please report it",
            query.id,
            original.output,
            sample.output,
        )
    return near_ties, unexplained
