"""Searching the static sets that every query shares: the baseline that per-query choice has to beat.

Greedy, as in SLEB and PuDDing: from no pruning on, add the layer whose pruning hurts the likelihood of the reference answers
least, under the adapters, by teacher forcing. Or, of the few layers that hurt it least, the one that leaves most answers right.
The sets for all sizes come from one search, each the last one and a layer more.
"""

from collections.abc import Callable, Iterator, Sequence

from dynprune.slm.likelihood import AnswerBatch, Answered, score_configurations, similar_samples
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner

# A set, and a figure that it was chosen by.
_Found = tuple[tuple[int, ...], float]


def greedy_static_sets(
    slm: SLM,
    pruner: LayerPruner,
    samples: Sequence[Answered],
    nats_alone_L: Sequence[float],
    largest: int,
    candidates: int | None,
    begun: tuple[int, ...] = (),
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Grows a static set layer by layer, by likelihood.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        samples: Prompt and reference answer of each sample, as tokens.
        nats_alone_L: Negative log-likelihood of all answers with each of the L layers pruned alone, in nats: the first step.
        largest: Size of the largest set.
        candidates: After the first layer, only so many are tried, those that hurt least alone; ``None`` tries all.
        begun: The set that an earlier search of the same came to, to go on from.

    Yields:
        The best set of each size up to ``largest``, larger than ``begun``, with its mean negative log-likelihood, in nats a
        token.

    Raises:
        ValueError: If a set cannot have so many layers, there are too few candidates, or there are no samples.
    """
    return _grow(slm, pruner, samples, nats_alone_L, largest, candidates, begun, lambda ranked: ranked[0])


def accurate_static_sets(
    slm: SLM,
    pruner: LayerPruner,
    samples: Sequence[Answered],
    nats_alone_L: Sequence[float],
    validation: Sequence[Answered],
    largest: int,
    candidates: int | None,
    finalists: int,
    begun: tuple[int, ...] = (),
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Grows a static set layer by layer, by accuracy among the sets that are likeliest.

    An answer is right where the likeliest token is the reference's each time: greedy decoding would give the reference.

    Args:
        slm: The SLM.
        pruner: Its pruner with adapters, entered.
        samples: What the likelihood is measured on, see `greedy_static_sets`.
        nats_alone_L: See `greedy_static_sets`.
        validation: What the accuracy is measured on.
        largest: See `greedy_static_sets`.
        candidates: See `greedy_static_sets`.
        finalists: At each step the accuracy decides between so many sets, those of the best likelihood; among the equally
            accurate the likelihood does.
        begun: See `greedy_static_sets`.

    Yields:
        The set of each size up to ``largest``, larger than ``begun``, with its accuracy, 0..1.

    Raises:
        ValueError: See `greedy_static_sets`; or if there is no finalist.
    """
    if finalists < 1:
        raise ValueError(f"evaluation.baselines.static_accuracy.finalists={finalists} tries no layer; allowed: at least 1")

    def most_accurate(ranked: list[_Found]) -> _Found:
        sets = [layers for layers, _ in ranked[:finalists]]
        right = [0] * len(sets)
        for _, scores in score_configurations(slm, pruner, validation, sets):
            right = [count + int(scored.right_B.sum()) for count, scored in zip(right, scores, strict=True)]
        best = right.index(max(right))
        return sets[best], right[best] / len(validation)

    return _grow(slm, pruner, samples, nats_alone_L, largest, candidates, begun, most_accurate)


def check_candidates(candidates: int | None, largest: int) -> None:
    """Checks that a search over some layers can reach its largest set.

    Raises:
        ValueError: If they are fewer than its layers.
    """
    if candidates is not None and candidates < largest:
        raise ValueError(
            f"evaluation.static_candidates={candidates} is fewer than the {largest} layers of the largest static set; "
            f"allowed: at least {largest}, or null for all layers"
        )


def _grow(
    slm: SLM,
    pruner: LayerPruner,
    samples: Sequence[Answered],
    nats_alone_L: Sequence[float],
    largest: int,
    candidates: int | None,
    begun: tuple[int, ...],
    choose: Callable[[list[_Found]], _Found],
) -> Iterator[_Found]:
    """Grows a set by what is chosen from the sets of a layer more, which come by likelihood, the best first."""
    if not 1 <= largest <= slm.num_layers:
        raise ValueError(
            f"evaluation.static asks for a set of {largest} layers, but {slm.name} has {slm.num_layers}; allowed: 1 to "
            f"{slm.num_layers}; for example evaluation.static=[2,3,5]"
        )
    if not samples:
        raise ValueError("the search for static sets needs samples of the train split; set evaluation.static_samples")
    check_candidates(candidates, largest)
    # Each answer's tokens and its stop token.
    tokens = sum(len(answer) + 1 for _, answer in samples)
    by_loss = sorted(range(slm.num_layers), key=lambda layer: nats_alone_L[layer])
    tried = by_loss[:candidates]
    chosen = begun
    if not chosen:
        chosen, figure = choose([((layer,), nats_alone_L[layer] / tokens) for layer in by_loss])
        yield chosen, figure
    batches = [AnswerBatch(slm, [samples[position] for position in positions]) for positions in similar_samples(slm, samples)]
    while len(chosen) < largest:
        losses = dict.fromkeys((layer for layer in tried if layer not in chosen), 0.0)
        for batch in batches:
            pruner.prune(chosen)
            inputs, _ = batch.run(slm)
            for layer in losses:
                pruner.prune([*chosen, layer])
                losses[layer] += float(batch.scores(slm, layer, inputs[layer]).nats_B.sum())
        ranked = sorted(losses, key=lambda layer: losses[layer])
        chosen, figure = choose([(tuple(sorted([*chosen, layer])), losses[layer] / tokens) for layer in ranked])
        yield chosen, figure
