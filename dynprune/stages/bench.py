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
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dynprune.adapters.stack import AdapterStack
from dynprune.atomic import replacing
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.data.tasks import Query
from dynprune.evaluation.latency import time_rows
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import ConditionalBernoulliPolicy, SinkhornPolicy
from dynprune.slm.cache import ReservingCache
from dynprune.slm.generation import Continuation, Request, generate_all
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.progress import track
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
    measures: Sequence[Callable[[Run], Line]] = (_explore, _prune_overhead, _distill, _log_prob)
    lines = [measure(run) for measure in track(measures, "benchmarks", len(measures))]
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
    queries = run.queries("train", 4, "bench")
    stack = _stack(run)
    configurations = [(i, (i + 7) % run.slm.num_layers) for i in range(8)]

    def requests(drafted: bool) -> list[Request]:
        made = []
        for query in queries:
            prompt, reference = run.tokens(query)
            draft = Continuation(reference, truncated=False) if drafted else None
            made += [Request(prompt, tuple(sorted(c)), limit, draft) for c in configurations]
        return made

    limit = run.max_new_tokens(queries)

    def explore(drafted: bool, batch_size: int) -> Callable[[], object]:
        def generate() -> object:
            with LayerPruner(run.slm, stack) as pruner:
                return list(generate_all(run.slm, pruner, requests(drafted), batch_size))

        return generate

    batch = run.config.hardware.batch_size
    this, against = _in_turns(explore(drafted=True, batch_size=batch), explore(drafted=False, batch_size=1), 1)
    count = len(queries) * len(configurations)
    return Line("explore", against / this, ">= 8", count / this, count / against, "rollouts/s")


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


def _in_turns(this: Callable[[], object], against: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both sides, after one run of each that does not count."""
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
