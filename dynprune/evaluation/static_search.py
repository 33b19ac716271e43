"""Searching the static sets that every query shares: the baseline that per-query choice has to beat.

Greedy, as in SLEB and PuDDing: from no pruning on, add the layer whose pruning hurts the likelihood of the reference answers
least, under the adapters, by teacher forcing. The sets for all sizes come from one search, each the last one and a layer more.
"""

from collections.abc import Iterator, Sequence

from dynprune.slm.likelihood import AnswerBatch, Answered
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner


def greedy_static_sets(
    slm: SLM,
    pruner: LayerPruner,
    samples: Sequence[Answered],
    largest: int,
    candidates: int | None,
    batch_size: int,
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Grows a static set layer by layer.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        samples: Prompt and reference answer of each sample, as tokens.
        largest: Size of the largest set.
        candidates: After the first layer, only so many are tried, those that hurt least alone; ``None`` tries all.
        batch_size: Samples in a batch.

    Yields:
        The best set of each size from 1 to ``largest`` with its mean negative log-likelihood, in nats a token.

    Raises:
        ValueError: If a set cannot have so many layers, there are too few candidates, or there are no samples.
    """
    if not 1 <= largest <= slm.num_layers:
        raise ValueError(
            f"evaluation.static asks for a set of {largest} layers, but {slm.name} has {slm.num_layers}; allowed: 1 to "
            f"{slm.num_layers}; for example evaluation.static=[2,3,5]"
        )
    if not samples:
        raise ValueError("the search for static sets needs samples of the train split; set evaluation.static_samples")
    batches = [AnswerBatch.of(slm, samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    if candidates is not None and candidates < largest:
        raise ValueError(
            f"evaluation.static_candidates={candidates} is fewer than the {largest} layers of the largest static set; "
            f"allowed: at least {largest}, or null for all layers"
        )
    chosen: tuple[int, ...] = ()
    tried = list(range(slm.num_layers))
    for _ in range(largest):
        losses = dict.fromkeys((layer for layer in tried if layer not in chosen), 0.0)
        tokens = 0
        for batch in batches:
            pruner.prune(chosen)
            inputs, scores = batch.run(slm)
            tokens += int(scores.tokens_B.sum())
            for layer in losses:
                pruner.prune([*chosen, layer])
                losses[layer] += float(batch.scores(slm, layer, inputs[layer]).nats_B.sum())
        ranked = sorted(losses, key=lambda layer: losses[layer])
        if not chosen:
            tried = ranked[:candidates]
        best = ranked[0]
        chosen = tuple(sorted([*chosen, best]))
        yield chosen, losses[best] / tokens
