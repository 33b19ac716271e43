"""How fast adapters and routers are trained, and that distillation takes no more memory for more samples.

Shapes: B = batch, L = layers.
"""

import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from omegaconf import DictConfig

from dynprune.adapters.stack import AdapterStack
from dynprune.benchmarks.line import PRUNED, Line, in_turns
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.methods.dpo import DirectPreferenceOptimization
from dynprune.router.inputs import RouterInputs
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import ConditionalBernoulliPolicy, SinkhornPolicy
from dynprune.router.ratio import NormalRatio
from dynprune.stages.router import new_policy, new_router
from dynprune.stages.run import Run, portable_config


def distill(run: Run) -> Line:
    """A step that trains all adapters, the teacher's pass included, against the teacher's pass alone."""
    sequences = _sequences(run)

    @torch.no_grad()
    def teacher() -> None:
        for sequence in sequences:
            run.slm.model(input_ids=torch.tensor([sequence], device=run.slm.device), use_cache=False, logits_to_keep=1)

    this, against = in_turns(3, run.slm.device, _distillation(run, sequences), teacher)
    steps = len(sequences)
    return Line("distill", this / against, "<= 1.5", this / steps, against / steps, "s/step")


def distill_memory(run: Run) -> Line:
    """Peak memory of a process that distils from ten times the samples, against one that does not."""
    few, many = (_alone(_peak_memory, run, times) for times in (1, 10))
    return Line("distill_memory", many / few, "<= 1.1", many, few, "MiB")


def _sequences(run: Run) -> list[tuple[int, ...]]:
    queries = run.queries("train", 6, "bench")
    return [(*prompt, *answer) for prompt, answer in map(run.tokens, queries)]


def _distillation(run: Run, sequences: Sequence[Sequence[int]]) -> Callable[[], None]:
    stream = HiddenStateStream(run.slm, sequences, batch_tokens=1, seed=None)
    stack = AdapterStack(run.slm.num_layers, run.slm.hidden_size, run.config.adapter.bottleneck).to(run.slm.device)
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-3)

    def train() -> None:
        for states_SNd in stream:
            states = states_SNd.float()
            loss = (stack(states[:-1]) - states[1:]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def _peak_memory(run: Run, times: int) -> float:
    """Peak resident memory of this process, in MiB."""
    _distillation(run, _sequences(run)[:2] * times)()
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, what `getrusage` says of a process begins with the peak of the process that started it.
        [peak] = [line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
        return int(peak) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _alone(work: Callable[[Run, int], float], run: Run, argument: int) -> float:
    """Runs work in a process of its own, which loads all it needs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_run, work, portable_config(run), argument).result()


def _with_run(work: Callable[[Run, int], float], config: DictConfig, argument: int) -> float:
    return work(Run(config), argument)


def log_prob(run: Run) -> Line:
    """Log π of a batch, forward and backward, against the thesis's way: row by row through Sinkhorn."""
    num_layers, batch, looped = 30, 4096, 64
    generator = torch.Generator().manual_seed(0)
    logits_BL = torch.randn(batch, num_layers, generator=generator)
    mu_B = torch.rand(batch, generator=generator)
    log_sigma_B = torch.full((batch,), -4.0)
    mask_BL = torch.rand(batch, num_layers, generator=generator) < 0.2

    def backward(policy: ConditionalBernoulliPolicy | SinkhornPolicy, rows: slice) -> None:
        leaf = logits_BL[rows].clone().requires_grad_()
        outputs = RouterOutputs(leaf, NormalRatio(mu_B[rows], log_sigma_B[rows]))
        policy.log_prob(outputs, mask_BL[rows]).sum().backward()

    exact, thesis = ConditionalBernoulliPolicy(num_layers), SinkhornPolicy(num_layers)

    def row_by_row() -> None:
        for row in range(looped):
            backward(thesis, slice(row, row + 1))

    this, against = in_turns(5, torch.device("cpu"), lambda: backward(exact, slice(None)), row_by_row)
    this, against = batch / this, looped / against
    return Line("log_prob", this / against, ">= 50", this, against, "rows/s")


def router_step(run: Run) -> Line:
    """Steps of DPO on embeddings that were computed once, against the encoder run for each pair."""
    queries = run.queries("train", 8, "bench")
    network, policy = new_router(run), new_policy(run)
    method = DirectPreferenceOptimization(network, policy, partial(torch.optim.AdamW, lr=1e-3), 0.1, "frozen")
    optimizer = method.configure_optimizers()
    texts = {query.id: network.encoder.render(query) for query in queries}
    ids = [query.id for query in queries] * 4
    winner_BL = torch.zeros(len(ids), run.slm.num_layers, dtype=torch.bool)
    winner_BL[:, list(PRUNED)] = True
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

    this, against = in_turns(5, torch.device("cpu"), step(lambda: cached(ids)), step(encoded))
    this, against = len(ids) / this, len(ids) / against
    return Line("router_step", this / against, ">= 10", this, against, "pairs/s")
