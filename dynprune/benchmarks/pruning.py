"""What pruned generation saves, against what it could save."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from dynprune.benchmarks.line import PRUNED, Line, in_turns, untrained_stack
from dynprune.data.tasks import Query
from dynprune.evaluation.latency import TimedRow, time_rows
from dynprune.evaluation.speedup import measured_speedup
from dynprune.slm.cache import ReservingCache
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.router import TrainedRouter, new_policy, new_router
from dynprune.stages.run import Run


def prune_overhead(run: Run) -> Line:
    """Time saved by pruning with router and adapters, against that of an SLM without the layers, as shares of the full time."""
    queries = run.queries("train", 9, "bench")
    prompts = [run.tokens(query)[0] for query in queries]
    removed = _without_pruned_layers(run)
    route = TrainedRouter(new_router(run), new_policy(run), run.slm.device).chooser()

    def choose(query: Query) -> Sequence[int]:
        # An untrained router takes as long as another, but all rows are to prune the same layers.
        route(query)
        return PRUNED

    def decode(
        slm: SLM, pruner: LayerPruner, prompt: Sequence[int], configuration: Sequence[int], tokens: int, cache: ReservingCache
    ) -> Iterator[object]:
        token = torch.tensor([list(prompt)], device=slm.device)
        for _ in range(tokens):
            token = removed(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)
            yield token

    rows = {"full": TimedRow(lambda query: ()), "pruned": TimedRow(choose), "removed": TimedRow(lambda query: (), decode)}
    with LayerPruner(run.slm, untrained_stack(run)) as pruner:
        timings = list(time_rows(run.slm, pruner, queries, prompts, [32] * len(queries), rows, 1, 0))
    seconds = {name: [timing.total for timing in timings if timing.row == name] for name in rows}
    this, against = (measured_speedup(seconds[name], seconds["full"]).median for name in ("pruned", "removed"))
    return Line("prune_overhead", this / against, ">= 0.85", this, against, "share of time saved")


def _without_pruned_layers(run: Run) -> PreTrainedModel:
    """A copy of the SLM that never had the pruned layers."""
    removed = copy.deepcopy(run.slm.model)
    decoder = removed.get_decoder()
    decoder.layers = torch.nn.ModuleList(layer for index, layer in enumerate(decoder.layers) if index not in PRUNED)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    removed.config.num_hidden_layers = len(decoder.layers)
    return removed


def prune_overhead_b8(run: Run) -> Line:
    """Batches of 8 in which each row has its own configuration, against one configuration for all of them."""
    queries = run.queries("train", 8, "bench")
    prompts = [run.tokens(query)[0] for query in queries]
    stack, num_layers = untrained_stack(run), run.slm.num_layers
    own = [tuple(sorted((layer + row) % num_layers for layer in PRUNED)) for row in range(len(prompts))]

    def generated(configurations: Sequence[tuple[int, ...]]) -> Callable[[], object]:
        requests = [Request(prompt, c, 24) for prompt, c in zip(prompts, configurations, strict=True)]

        def work() -> None:
            with LayerPruner(run.slm, stack) as pruner:
                list(generate_all(run.slm, pruner, requests, len(requests)))

        return work

    this, against = in_turns(3, run.slm.device, generated(own), generated([PRUNED] * len(prompts)))
    return Line("prune_overhead_b8", against / this, ">= 0.7", 1 / this, 1 / against, "batches/s")
