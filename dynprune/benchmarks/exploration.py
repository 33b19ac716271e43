"""How fast configurations are explored, against the simple ways to do it."""

import logging
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dynprune.adapters.stack import AdapterStack
from dynprune.benchmarks.line import Line, untrained_stack
from dynprune.data.prompts import prompt_tokens
from dynprune.data.rollouts import Rollout
from dynprune.data.tasks import Query
from dynprune.exploration.dfs import DepthFirstSearch
from dynprune.exploration.engine import explore, max_new_tokens
from dynprune.metrics.certainty import LOST, Lost
from dynprune.metrics.scores import SCORES
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.run import Run, portable_config

log = logging.getLogger(__name__)
_SCORE = "json_match"
_QUERIES = 36
_CONFIGURATIONS = 20
_FIRST_QUERIES = 4
_SAMPLED = 12
_BATCH = 16
# What the worker processes share out.
_SHARED_QUERIES, _SHARED_CONFIGURATIONS = 12, 6


def explore_lines(run: Run) -> list[Line]:
    """The depth-first search of the stage ``explore``, against the simple ways to score configurations.

    ``explore``: modules are swapped and one query is generated at a time. ``explore_batched``: one configuration at a time,
    16 queries as a padded batch. Both use transformers' own ``generate`` with its cache. They take some of a search's
    configurations, once before the search that is timed and once after it; outputs and scores are compared.
    """
    task = Task.of(run)
    queries = run.queries("train", _QUERIES, "bench")
    # A small search of the same depth, so that both measurements of the rivals are of configurations alike.
    first = task.explored(queries[:_FIRST_QUERIES], _CONFIGURATIONS)
    before = _rivals(task, queries, random.Random(0).sample(first, _SAMPLED))
    start = time.perf_counter()
    rollouts = task.explored(queries, _CONFIGURATIONS)
    search = len(rollouts) / (time.perf_counter() - start)
    after = _rivals(task, queries, random.Random(1).sample(rollouts, _SAMPLED))
    one, batch = (statistics.median(rates) for rates in zip(before, after, strict=True))
    return [
        Line("explore", search / one, ">= 8", search, one, "rollouts/s"),
        Line("explore_batched", search / batch, ">= 4", search, batch, "rollouts/s"),
    ]


def _rivals(task: "Task", queries: Sequence[Query], rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Rates of both rivals, in rollouts a second; the rollouts of the search are compared with theirs."""
    by_id = {query.id: query for query in queries}
    start = time.perf_counter()
    outputs = []
    for rollout in rollouts:
        asked = by_id[rollout.id]
        outputs += swap_and_generate(task.slm, task.stack, [asked], rollout.pruned_layers, [task.limit(asked)])
    one = len(rollouts) / (time.perf_counter() - start)
    differ = sum(not _same(r, output, by_id[r.id]) for r, output in zip(rollouts, outputs, strict=True))
    log.info("explore: %d of %d rollouts differ from the rival's", differ, len(rollouts))
    together = queries[:_BATCH]
    limits = [task.limit(query) for query in together]
    start = time.perf_counter()
    for rollout in rollouts[:2]:
        swap_and_generate(task.slm, task.stack, together, rollout.pruned_layers, limits)
    return one, 2 * len(together) / (time.perf_counter() - start)


def _same(rollout: Rollout, output: str, query: Query) -> bool:
    """Whether a rollout has the score of an output, and the output itself or, where it was cut, its beginning."""
    said = output.startswith(rollout.output) if rollout.cut else output == rollout.output
    return said and SCORES[_SCORE](output, query) == rollout.score


def explore_shards(run: Run) -> Line:
    """Two worker processes of one thread each, against one process with all threads."""
    queries = run.queries("train", _SHARED_QUERIES, "bench")
    parts = (queries[::2], queries[1::2])
    with ProcessPoolExecutor(
        2, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(portable_config(run),)
    ) as pool:
        # Both have loaded the SLM when both have answered.
        list(pool.map(_explore_in_worker, [part[:1] for part in parts], [2, 2]))
        start = time.perf_counter()
        count = sum(pool.map(_explore_in_worker, parts, [_SHARED_CONFIGURATIONS] * 2))
        this = count / (time.perf_counter() - start)
    start = time.perf_counter()
    against = len(Task.of(run).explored(queries, _SHARED_CONFIGURATIONS)) / (time.perf_counter() - start)
    return Line("explore_shards", this / against, ">= 1", this, against, "rollouts/s")


@dataclass(frozen=True)
class Task:
    """What is explored, and with how much at once."""

    slm: SLM
    stack: AdapterStack
    lost: Lost | None
    max_tokens_margin: float
    batch_size: int
    shared_bytes: int

    @classmethod
    def of(cls, run: Run) -> "Task":
        """The run's own settings, and adapters that pass everything unchanged."""
        return cls(
            slm=run.slm,
            stack=untrained_stack(run),
            lost=LOST[_SCORE],
            max_tokens_margin=run.config.exploration.max_tokens_margin,
            batch_size=run.config.hardware.batch_size,
            shared_bytes=run.shared_bytes,
        )

    def explored(self, queries: Sequence[Query], configurations: int) -> list[Rollout]:
        """The rollouts of a depth-first search, as the stage ``explore`` makes them."""
        with LayerPruner(self.slm, self.stack) as pruner:
            found = explore(
                self.slm,
                pruner,
                queries,
                DepthFirstSearch(max_scenarios=configurations),
                SCORES[_SCORE],
                self.lost,
                self.max_tokens_margin,
                self.batch_size,
                self.shared_bytes,
                seed=0,
            )
            return [rollout for step in found for rollout in step.ended or () if isinstance(rollout, Rollout)]

    def limit(self, query: Query) -> int:
        """Most tokens of an answer to a query, as in the search."""
        return max_new_tokens(self.slm, query, self.max_tokens_margin)


_worker: dict[str, Task] = {}


def _start_worker(config: DictConfig) -> None:
    torch.set_num_threads(1)
    _worker["task"] = Task.of(Run(config))


def _explore_in_worker(queries: Sequence[Query], configurations: int) -> int:
    return len(_worker["task"].explored(queries, configurations))


class _Adapter(nn.Module):
    """What stands in a layer's place where modules are swapped."""

    def __init__(self, stack: AdapterStack, layer: int) -> None:
        super().__init__()
        self._stack = stack
        self._layer = layer

    def forward(self, hidden_BTd: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._stack.layer(self._layer, hidden_BTd, kwargs.get("position_ids"))


@contextmanager
def swapped(slm: SLM, stack: AdapterStack, pruned_layers: Sequence[int]) -> Iterator[None]:
    """The usual way to prune: the modules of the layers are replaced, and the others renumbered for the cache."""
    decoder = slm.model.get_decoder()
    original = decoder.layers
    kept = [layer for index, layer in enumerate(original) if index not in pruned_layers]
    decoder.layers = nn.ModuleList(
        _Adapter(stack, index) if index in pruned_layers else layer for index, layer in enumerate(original)
    )
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    try:
        yield
    finally:
        decoder.layers = original
        for number, layer in enumerate(original):
            layer.self_attn.layer_idx = number


def swap_and_generate(
    slm: SLM, stack: AdapterStack, queries: Sequence[Query], pruned_layers: Sequence[int], limits: Sequence[int]
) -> list[str]:
    """Swaps modules and calls transformers' ``generate`` with its cache, all queries as one padded batch."""
    prompts = [prompt_tokens(slm.tokenizer, query) for query in queries]
    batch = slm.tokenizer.pad({"input_ids": [list(prompt) for prompt in prompts]}, return_tensors="pt").to(slm.device)
    with swapped(slm, stack, pruned_layers):
        output = slm.generate(
            **batch, max_new_tokens=max(limits), do_sample=False, pad_token_id=slm.tokenizer.pad_token_id, use_cache=True
        )
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    return [slm.decode(answer[:limit]) for answer, limit in zip(answers, limits, strict=True)]
