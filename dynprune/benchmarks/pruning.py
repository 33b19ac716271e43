"""What pruned generation saves, against what it could save."""

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dynprune.benchmarks.line import PRUNED, Line, in_turns, seconds, untrained_stack
from dynprune.evaluation.latency import TimedRow, time_rows
from dynprune.slm.cache import ReservingCache
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.run import Run


def prune_overhead(run: Run) -> Line:
    """Time saved by pruning with adapters, against that of an SLM without the layers, both as shares of the full time."""
    queries = run.queries("train", 3, "bench")
    prompts = [run.tokens(query)[0] for query in queries]
    removed = copy.deepcopy(run.slm.model)
    kept = [i for i in range(run.slm.num_layers) if i not in PRUNED]
    layers = removed.get_decoder().layers
    removed.get_decoder().layers = torch.nn.ModuleList(layers[i] for i in kept)
    for index, layer in enumerate(removed.get_decoder().layers):
        layer.self_attn.layer_idx = index
    removed.config.num_hidden_layers = len(kept)

    @torch.inference_mode()
    def without_layers(prompt: Sequence[int]) -> None:
        cache, token = ReservingCache(), torch.tensor([list(prompt)], device=run.slm.device)
        for _ in range(32):
            token = removed(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)

    rows = {"full": TimedRow(lambda query: ()), "pruned": TimedRow(lambda query: PRUNED)}
    full, pruned, physical = [], [], []
    without_layers(prompts[0])
    for _ in range(3):
        with LayerPruner(run.slm, untrained_stack(run)) as pruner:
            timings = list(time_rows(run.slm, pruner, queries, prompts, [32] * len(queries), rows, 1, 0))
        full += [t.total for t in timings if t.row == "full"]
        pruned += [t.total for t in timings if t.row == "pruned"]
        physical += [seconds(partial(without_layers, prompt), run.slm.device) for prompt in prompts]
    this = 1 - statistics.median(pruned) / statistics.median(full)
    against = 1 - statistics.median(physical) / statistics.median(full)
    return Line("prune_overhead", this / against, ">= 0.85", this, against, "share of time saved")


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
