"""The stage ``bench``: ratios of times, both sides in turns in one run, medians, with the machine named.

Shapes: B = batch, L = layers.
"""

import copy
import json
import logging
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dynprune.adapters.stack import AdapterStack
from dynprune.atomic import replacing
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.data.prompts import render_router_input
from dynprune.data.tasks import Query
from dynprune.evaluation.latency import time_rows
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.methods.dpo import DirectPreferenceOptimization
from dynprune.router.inputs import RouterInputs
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import ConditionalBernoulliPolicy, SinkhornPolicy
from dynprune.slm.cache import ReservingCache
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.progress import track
from dynprune.stages.router import new_policy, new_router
from dynprune.stages.run import Run

log = logging.getLogger(__name__)
_PRUNED = (3, 7, 12, 18, 22, 26)


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        name: What is compared.
        ratio: The figure that the target is about.
        target: What it should reach.
        this: Median of this side.
        against: Median of the other side.
        unit: Unit of both medians.
    """

    name: str
    ratio: float
    target: str
    this: float
    against: float
    unit: str


def bench(run: Run) -> Path:
    """Measures all lines and writes ``bench.json``.

    Returns:
        The file.
    """
    measures: Sequence[Callable[[Run], Line]] = (
        _explore,
        _explore_batched,
        _prune_overhead,
        _prune_overhead_b8,
        _distill,
        _log_prob,
        _router_step,
    )
    lines = []
    for line in track((measure(run) for measure in measures), "benchmarks", len(measures)):
        log.info("%s: %.4g against %.4g %s, a ratio of %.2f", line.name, line.this, line.against, line.unit, line.ratio)
        lines.append(line)
    document = {
        "lines": [asdict(line) for line in lines],
        "machine": {**describe_machine(), "dtype": run.model_identity["dtype"]},
        "versions": versions(),
        "commit": _commit(),
    }
    target = Path(run.config.paths.outputs) / "bench" / "bench.json"
    with replacing(target) as path:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    table = Table("line", "ratio", "target", "this", "against", "unit")
    for line in lines:
        table.add_row(line.name, f"{line.ratio:.2f}", line.target, f"{line.this:.4g}", f"{line.against:.4g}", line.unit)
    Console().print(table)
    log.info("wrote %s", target)
    return target


def _explore(run: Run) -> Line:
    """Configurations verified in batches, against one at a time generated token by token."""
    return _exploration(run, "explore", ">= 8", num_queries=3, num_configurations=4, against_batch=1)


def _explore_batched(run: Run) -> Line:
    """Configurations verified in batches, against one configuration at a time for batches of 16 queries."""
    return _exploration(run, "explore_batched", ">= 4", num_queries=16, num_configurations=3, against_batch=16)


def _exploration(run: Run, name: str, target: str, num_queries: int, num_configurations: int, against_batch: int) -> Line:
    chosen = run.queries("train", num_queries, "bench")
    stack, limit = _stack(run), run.max_new_tokens(chosen)
    configurations = [tuple(sorted((i, (i + 7) % run.slm.num_layers))) for i in range(num_configurations)]
    # In the order of the rival, which takes one configuration after the other.
    rows = [(configuration, query) for configuration in configurations for query in chosen]

    def requests(drafted: bool) -> list[Request]:
        made = []
        for configuration, query in rows:
            prompt, reference = run.tokens(query)
            made.append(Request(prompt, configuration, limit, (reference,) if drafted else ()))
        return made

    def verified() -> list[tuple[int, ...]]:
        return _outputs(run, stack, requests(drafted=True), run.config.hardware.batch_size)

    def rival() -> list[tuple[int, ...]]:
        plain = requests(drafted=False)
        batches = [plain[start : start + len(chosen)] for start in range(0, len(plain), len(chosen))]
        return [output for batch in batches for output in _outputs(run, stack, batch, against_batch)]

    differ = sum(a != b for a, b in zip(verified(), rival(), strict=True))
    if differ:
        log.warning("%s: %d of %d outputs differ, by near-ties of the two likeliest tokens", name, differ, len(rows))
    this, against = _in_turns(verified, rival, 1, warm=True)
    return Line(name, against / this, target, len(rows) / this, len(rows) / against, "rollouts/s")


def _outputs(run: Run, stack: AdapterStack, requests: Sequence[Request], batch_size: int) -> list[tuple[int, ...]]:
    with LayerPruner(run.slm, stack) as pruner:
        by_position = dict(generate_all(run.slm, pruner, requests, batch_size))
    return [by_position[position].token_ids for position in range(len(requests))]


def _prune_overhead(run: Run) -> Line:
    """Time saved by pruning with adapters, against that of an SLM without the layers, both as shares of the full time."""
    queries = run.queries("train", 3, "bench")
    prompts = [run.tokens(query)[0] for query in queries]
    removed = copy.deepcopy(run.slm.model)
    kept = [i for i in range(run.slm.num_layers) if i not in _PRUNED]
    layers = removed.get_decoder().layers
    removed.get_decoder().layers = torch.nn.ModuleList(layers[i] for i in kept)
    for index, layer in enumerate(removed.get_decoder().layers):
        layer.self_attn.layer_idx = index
    removed.config.num_hidden_layers = len(kept)

    @torch.inference_mode()
    def without_layers(prompt: Sequence[int]) -> float:
        start, cache = time.perf_counter(), ReservingCache()
        token = torch.tensor([list(prompt)])
        for _ in range(32):
            token = removed(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)
        return time.perf_counter() - start

    rows: dict[str, Callable[[Query], Sequence[int]]] = {
        "full": lambda query: (),
        "pruned": lambda query: _PRUNED,
    }
    full, pruned, physical = [], [], []
    without_layers(prompts[0])
    for _ in range(3):
        with LayerPruner(run.slm, _stack(run)) as pruner:
            timings = list(time_rows(run.slm, pruner, queries, prompts, [32] * len(queries), rows, 1, 0))
        full += [t.total for t in timings if t.row == "full"]
        pruned += [t.total for t in timings if t.row == "pruned"]
        physical += [without_layers(prompt) for prompt in prompts]
    this = 1 - statistics.median(pruned) / statistics.median(full)
    against = 1 - statistics.median(physical) / statistics.median(full)
    return Line("prune_overhead", this / against, ">= 0.85", this, against, "share of time saved")


def _prune_overhead_b8(run: Run) -> Line:
    """Batches of 8 in which each row has its own configuration, against one configuration for all of them."""
    queries = run.queries("train", 8, "bench")
    prompts = [run.tokens(query)[0] for query in queries]
    stack, num_layers = _stack(run), run.slm.num_layers
    own = [tuple(sorted((layer + row) % num_layers for layer in _PRUNED)) for row in range(len(prompts))]

    def generated(configurations: Sequence[tuple[int, ...]]) -> Callable[[], object]:
        requests = [Request(prompt, c, 24) for prompt, c in zip(prompts, configurations, strict=True)]
        return lambda: _outputs(run, stack, requests, len(requests))

    this, against = _in_turns(generated(own), generated([_PRUNED] * len(prompts)), 3)
    return Line("prune_overhead_b8", against / this, ">= 0.7", 1 / this, 1 / against, "batches/s")


def _distill(run: Run) -> Line:
    """A step that trains all adapters, the teacher's pass included, against the teacher's pass alone."""
    queries = run.queries("train", 6, "bench")
    sequences = [[*prompt, *answer] for prompt, answer in map(run.tokens, queries)]
    stream = HiddenStateStream(run.slm, sequences, batch_tokens=1, seed=None)
    stack = AdapterStack(run.slm.num_layers, run.slm.hidden_size, run.config.adapter.bottleneck)
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-3)

    def train() -> None:
        for states_SNd in stream:
            states = states_SNd.float()
            loss = (stack(states[:-1]) - states[1:]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def teacher() -> None:
        for sequence in sequences:
            run.slm.model(input_ids=torch.tensor([sequence]), use_cache=False, logits_to_keep=1)

    this, against = _in_turns(train, teacher, 3)
    steps = len(sequences)
    return Line("distill", this / against, "<= 1.5", this / steps, against / steps, "s/step")


def _log_prob(run: Run) -> Line:
    """Log π of a batch, forward and backward, against the thesis's way: row by row through Sinkhorn."""
    num_layers, batch, looped = 30, 4096, 64
    generator = torch.Generator().manual_seed(0)
    logits_BL = torch.randn(batch, num_layers, generator=generator)
    mu_B = torch.rand(batch, generator=generator)
    log_sigma_B = torch.full((batch,), -4.0)
    mask_BL = torch.rand(batch, num_layers, generator=generator) < 0.2

    def backward(policy: ConditionalBernoulliPolicy | SinkhornPolicy, rows: slice) -> None:
        leaf = logits_BL[rows].clone().requires_grad_()
        outputs = RouterOutputs(leaf, mu_B[rows], log_sigma_B[rows])
        policy.log_prob(outputs, mask_BL[rows]).sum().backward()

    exact, thesis = ConditionalBernoulliPolicy(num_layers), SinkhornPolicy(num_layers)

    def row_by_row() -> None:
        for row in range(looped):
            backward(thesis, slice(row, row + 1))

    this, against = _in_turns(lambda: backward(exact, slice(None)), row_by_row, 5)
    this, against = batch / this, looped / against
    return Line("log_prob", this / against, ">= 50", this, against, "rows/s")


def _router_step(run: Run) -> Line:
    """Steps of DPO on embeddings that were computed once, against the encoder run for each pair."""
    queries = run.queries("train", 8, "bench")
    network, policy = new_router(run), new_policy(run)
    method = DirectPreferenceOptimization(network, policy, partial(torch.optim.AdamW, lr=1e-3), 0.1, "frozen")
    optimizer = method.configure_optimizers()
    texts = {query.id: render_router_input(query) for query in queries}
    ids = [query.id for query in queries] * 4
    winner_BL = torch.zeros(len(ids), run.slm.num_layers, dtype=torch.bool)
    winner_BL[:, list(_PRUNED)] = True
    masks = {"winner_mask_BL": winner_BL, "loser_mask_BL": winner_BL.roll(1, dims=1)}
    cached = RouterInputs(network, texts)

    def step(inputs: Callable[[], object]) -> Callable[[], None]:
        def train() -> None:
            batch = {"inputs": inputs(), **masks}
            loss, _ = method.training_loss(method.outputs(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return train

    def encoded() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"embedding_BE": network.encode(network.encoder.tokenize([texts[name] for name in ids]))}

    this, against = _in_turns(step(lambda: cached(ids)), step(encoded), 5)
    this, against = len(ids) / this, len(ids) / against
    return Line("router_step", this / against, ">= 10", this, against, "pairs/s")


def _in_turns(
    this: Callable[[], object], against: Callable[[], object], rounds: int, warm: bool = False
) -> tuple[float, float]:
    """Median seconds of both sides, after one run of each that does not count, unless both have run already."""
    if not warm:
        this()
        against()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, taken in zip((this, against), seconds, strict=True):
            start = time.perf_counter()
            side()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _stack(run: Run) -> AdapterStack:
    # Weights do not matter for time: untrained adapters cost what trained ones do.
    stack = AdapterStack(run.slm.num_layers, run.slm.hidden_size, run.config.adapter.bottleneck)
    return stack.to(device=run.slm.device, dtype=run.slm.model.dtype).requires_grad_(False)


def _commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
