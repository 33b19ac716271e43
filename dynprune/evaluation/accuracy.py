"""Running queries, each under one configuration or several, and scoring what the SLM says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dynprune.data.prompts import prompt_tokens
from dynprune.data.tasks import Query
from dynprune.metrics.scores import all_scores
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.loading import SLM
from dynprune.slm.prompt_states import PromptStates
from dynprune.slm.pruning import LayerPruner

RIGHT_BY = "ast_match"
"""The score that says whether an answer is right, in comparisons, curves and guarantees."""


@dataclass(frozen=True)
class Sample:
    """One test query under one configuration.

    Attributes:
        id: The query's id.
        pruned_layers: The configuration.
        output: What the SLM said.
        token_ids: The same as tokens.
        truncated: Whether the token limit cut it off.
        scores: All scores of the output.
        drafts: For an output that was drafted and verified, counts: passes of the full SLM and of the pruned one, tokens
            proposed and accepted.
    """

    id: str
    pruned_layers: tuple[int, ...]
    output: str
    token_ids: tuple[int, ...]
    truncated: bool
    scores: Mapping[str, float]
    drafts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A query to run.

    Attributes:
        query: The query.
        configurations: The configurations to run it under, layers in ascending order.
        drafts: Outputs that may well come again, the likeliest first; they change the speed, not the outputs.
    """

    query: Query
    configurations: tuple[tuple[int, ...], ...]
    drafts: tuple[tuple[int, ...], ...] = ()


def run_queries(
    slm: SLM,
    pruner: LayerPruner,
    asked: Sequence[Asked],
    max_new_tokens: int,
    batch_size: int,
    shared_bytes: int,
) -> Iterator[Sample]:
    """Generates and scores the answer of each query under each of its configurations.

    Args:
        slm: The SLM.
        pruner: Its pruner, entered.
        asked: The queries and their configurations.
        max_new_tokens: Limit of each output, stop token included.
        batch_size: Outputs generated together.
        shared_bytes: Memory for what configurations of the same query share.

    Yields:
        A sample for each query and configuration, in the order in which they finish.
    """
    each = [(one, configuration) for one in asked for configuration in one.configurations]
    requests = [
        Request(
            prompt=prompt_tokens(slm.tokenizer, one.query),
            pruned_layers=configuration,
            max_new_tokens=max_new_tokens,
            drafts=one.drafts,
        )
        for one, configuration in each
    ]
    for position, continuation in generate_all(slm, pruner, requests, batch_size, PromptStates(shared_bytes)):
        query, configuration = each[position][0].query, each[position][1]
        output = slm.decode(continuation.token_ids)
        yield Sample(
            id=query.id,
            pruned_layers=configuration,
            output=output,
            token_ids=continuation.token_ids,
            truncated=continuation.truncated,
            scores=all_scores(output, query),
        )
