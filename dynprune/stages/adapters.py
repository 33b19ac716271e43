"""The stage ``adapters``: fits the adapters of all layers to the answers that the SLM gets right, each alone, then together."""

import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from dynprune.adapters.checkpoint import (
    ADAPTER_FILES,
    adapters_folder,
    load_adapters,
    made_for,
    save_adapters,
    save_thesis_adapters,
)
from dynprune.adapters.context import ContextStream, ContextTraining, draw_configuration
from dynprune.adapters.distillation import Distillation
from dynprune.adapters.ridge import Moments, fit_ridge, moments_for
from dynprune.adapters.stack import AdapterStack
from dynprune.artifacts import Artifact
from dynprune.atomic import Pieces, replacing
from dynprune.data.datamodule import StreamData
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.evaluation.parts import AdapterPart
from dynprune.slm.likelihood import Answered, score_configurations, similar_samples
from dynprune.slm.loading import SLM, is_another
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.answers import answers, split_answers
from dynprune.stages.checkpoints import BestCheckpoint, StepCheckpoints, best_of, epoch_checkpoints, last_of
from dynprune.stages.part_report import report_parts
from dynprune.stages.progress import track
from dynprune.stages.run import Run, content_digest, once_a_run, plain

log = logging.getLogger(__name__)
VERSION = 2
CONTEXT_VERSION = 3
HARM_VERSION = 1
_HELD_OUT_DRAWS = 4
_FITS = ("distil", "ridge")
_LAST_TARGETS = ("output", "final_norm")
_ERRORS = "errors.json"
_HARM = "harm.json"
_MOMENTS = "moments.safetensors"
# How many times the time that it takes to keep the moments goes by until they are kept again, at least.
_LEAST_FOR_ITS_COST = 20


def fit_adapters(run: Run) -> None:
    """Makes the adapters, and notes in the run's folder how far they are from their layers."""
    artifact = adapters(run)
    if run.store.rank == 0:
        report_parts(run, {} if artifact is None else {"adapters": adapter_part(artifact)})


def adapter_part(artifact: Artifact) -> AdapterPart:
    """How far adapters are from their layers."""
    errors = json.loads((artifact.folder / _ERRORS).read_text(encoding="utf-8"))
    return AdapterPart(tuple(errors["mse"]), tuple(errors["relative_error"]))


@once_a_run
def adapters(run: Run) -> Artifact | None:
    """Makes the adapters and measures their error; ``None`` where the configuration wants none."""
    if not run.config.adapter.enabled:
        return None
    _check(run.config.adapter, run.slm.num_layers)
    fitted = _fitted(run)
    return _trained_in_context(run, fitted) if run.config.adapter.context.epochs else fitted


def _check(settings: DictConfig, num_layers: int) -> None:
    """Refuses what would fail only after answers were generated.

    Raises:
        ValueError: If a setting is not possible.
    """
    if settings.fit not in _FITS:
        raise ValueError(f"adapter.fit={settings.fit} is unknown; allowed: {', '.join(_FITS)}")
    if settings.fit == "ridge" and settings.activation != "identity" and settings.folder is None:
        raise ValueError(
            f"adapter.fit=ridge solves for linear adapters, but adapter.activation={settings.activation}; allowed with it: "
            "adapter.activation=identity"
        )
    if settings.last_target not in _LAST_TARGETS:
        raise ValueError(f"adapter.last_target={settings.last_target} is unknown; allowed: {', '.join(_LAST_TARGETS)}")
    if settings.context.epochs:
        accumulation("adapter.context", settings.context)
        smallest, largest = settings.draw.min_layers, settings.draw.max_layers
        if not 1 <= smallest <= largest <= num_layers:
            raise ValueError(
                f"adapter.draw.min_layers={smallest} adapter.draw.max_layers={largest} are not possible with {num_layers} "
                f"layers; allowed: 1 <= min_layers <= max_layers <= {num_layers}"
            )
    if settings.draw.fragility <= 0:
        raise ValueError(
            f"adapter.draw.fragility={settings.draw.fragility} is not above 0; for example adapter.draw.fragility=0.2"
        )


def upstream_of(artifact: Artifact | None) -> dict[str, str]:
    """What identifies the adapters in the fingerprint of an artifact that is made under them."""
    return {"adapters": artifact.fingerprint if artifact else "none"}


def pruner_of(run: Run, artifact: Artifact | None, slm: SLM | None = None) -> LayerPruner:
    """The pruner of the run's SLM, or another one, with the run's adapters, to be entered."""
    slm = run.slm if slm is None else slm
    if artifact is None:
        return LayerPruner(slm)
    return LayerPruner(slm, load_adapters(artifact.folder).to(device=slm.device, dtype=slm.model.dtype))


def drawing(run: Run, stand_ins: Artifact | None) -> Callable[[random.Random], tuple[int, ...]]:
    """Draws a random configuration: the more a layer's pruning alone hurts, the rarer it is drawn."""
    settings = run.config.adapter.draw
    nats_L = json.loads((harm(run, stand_ins).folder / _HARM).read_text(encoding="utf-8"))
    weights = [math.exp(-max(0.0, nats) / settings.fragility) for nats in nats_L]
    return partial(draw_configuration, weights, settings.min_layers, settings.max_layers)


def _fitted(run: Run) -> Artifact:
    """Adapters that each learnt their own layer, and their errors."""
    settings = run.config.adapter
    source = answers(run)
    ready = None if settings.folder is None else adapters_folder(settings.folder)
    own = {key: value for key, value in plain(settings).items() if key not in ("context", "draw", "seed")}
    if settings.last_target == "output":
        # Adapters made before there was a choice are these.
        del own["last_target"]
    config = {
        "model": run.model_identity,
        "adapter": own,
        "folder": None if ready is None else content_digest(str(ready), ADAPTER_FILES),
        "precision": run.config.hardware.trainer.precision,
        "seed": run.config.adapter.seed,
    }

    def build(folder: Path) -> dict[str, Any]:
        training, validation = split_answers(run, source)
        # Loading the SLM draws from the generators, and is done by now where its answers had to be generated.
        slm = run.slm
        lightning.seed_everything(run.config.adapter.seed, workers=True)
        stack = (
            load_adapters(ready)
            if ready is not None
            else AdapterStack(slm.num_layers, slm.hidden_size, settings.bottleneck, settings.activation, sink=settings.sink)
        )
        # Refuses adapters of another shape before anything is computed with them.
        LayerPruner(slm, stack)
        if ready is not None and is_another(other := made_for(ready), slm):
            log.warning("adapter.folder=%s holds adapters of %s, but the SLM is %s", settings.folder, other, slm.name)
        # Drawn on the CPU, whatever the device, and then fitted where the states are.
        stack.to(slm.device)
        stream = _states(run, training, stack, run.config.adapter.seed)
        data = StreamData(stream, [_states(run, validation, stack, None)])
        module = Distillation(stack, settings.loss, instantiate(settings.optimizer))
        trainer = run.trainer(
            "adapters",
            folder,
            [epoch_checkpoints(folder / "checkpoints")],
            ids_of=lambda batch, epoch, number: _ids(run, stream.sequences(epoch, number)),
            max_epochs=settings.epochs,
        )
        if ready is None:
            if stack.sink_Ld is not None:
                stack.sink_Ld.copy_(_first_residuals(run, training))
            if settings.fit == "ridge":
                fit_ridge(stack, _moments(run, training, stack, folder / _MOMENTS), settings.ridge)
            else:
                trainer.fit(module, data, ckpt_path=last_of(folder / "checkpoints"))
        trainer.validate(module, data, verbose=False)
        _save(run, stack, module, folder)
        (folder / _MOMENTS).unlink(missing_ok=True)
        return {
            "training": len(training),
            "validation": len(validation),
            "mean_relative_error": float(module.relative_error_L.mean()),
        }

    return run.store.get_or_build("adapters", VERSION, config, {}, {"answers": source.fingerprint}, build, resumable=True)


def _trained_in_context(run: Run, fitted: Artifact) -> Artifact:
    """The adapters trained together through the SLM, from the fitted ones on."""
    settings = run.config.adapter.context
    source = answers(run)
    config = {
        "model": run.model_identity,
        "context": plain(settings),
        "draw": plain(run.config.adapter.draw),
        "validation_share": run.config.adapter.validation_share,
        "seed": run.config.adapter.seed,
    }

    def build(folder: Path) -> dict[str, Any]:
        training, validation = split_answers(run, source)
        stack = load_adapters(fitted.folder).to(run.slm.device).train().requires_grad_(True)
        draw = drawing(run, fitted)
        lightning.seed_everything(run.config.adapter.seed, workers=True)
        data = StreamData(
            ContextStream(training, draw, settings.micro_batch_size, run.config.adapter.seed),
            # Several configurations of each sample: one alone would choose the checkpoint by luck.
            [ContextStream(validation * _HELD_OUT_DRAWS, draw, settings.micro_batch_size, run.config.adapter.seed)],
            resumable=True,
        )
        places = folder / "checkpoints"
        best = BestCheckpoint(places, "validation/kl")
        trainer = run.trainer(
            "context",
            folder,
            [best, epoch_checkpoints(places), StepCheckpoints(places)],
            ids_of=lambda batch, epoch, number: _ids(run, [prompt for prompt, _ in batch.samples]),
            max_epochs=settings.epochs,
            accumulate_grad_batches=accumulation("adapter.context", settings),
            gradient_clip_val=settings.clip,
            # Products in the SLM's own dtype; what is trained is kept in float32.
            precision=run.mixed_precision,
        )
        with LayerPruner(run.slm, stack) as pruner:
            module = ContextTraining(run.slm, pruner, stack, instantiate(settings.optimizer), settings.warmup_share)
            [before] = trainer.validate(module, data, verbose=False)
            trainer.fit(module, data, ckpt_path=last_of(places))
        module.load_state_dict(best_of(best)["state_dict"])
        # How far each adapter is from its own layer now: farther than before, since it makes up for others too.
        errors = Distillation(stack, run.config.adapter.loss, instantiate(settings.optimizer))
        states = _states(run, validation, stack, None)
        run.trainer("adapters", folder, []).validate(errors, StreamData(states, [states]), verbose=False)
        _save(run, stack, errors, folder)
        kl_before, kl = before["validation/kl"], float(best.best_model_score or math.nan)
        if kl > kl_before:
            log.warning(
                "training under random configurations left the adapters farther from the SLM on held-out answers: %.3f nats a "
                "token, %.3f before; lower adapter.context.optimizer.lr, or leave it out by adapter.context.epochs=0",
                kl,
                kl_before,
            )
        return {"kl_before": kl_before, "kl": kl}

    return run.store.get_or_build(
        "context",
        CONTEXT_VERSION,
        config,
        {},
        {"adapters": fitted.fingerprint, "answers": source.fingerprint, "harm": harm(run, fitted).fingerprint},
        build,
        resumable=True,
    )


def _save(run: Run, stack: AdapterStack, measured: Distillation, folder: Path) -> None:
    """Writes adapters and their measured errors."""
    errors = {"mse": measured.mse_L.tolist(), "relative_error": measured.relative_error_L.tolist()}
    with replacing(folder / _ERRORS) as path:
        path.write_text(json.dumps(errors, indent=2), encoding="utf-8")
    save_adapters(stack, folder, run.slm.name)
    if stack.activation == "relu" and stack.sink_Ld is None:
        save_thesis_adapters(stack, folder / "thesis")


def _ids(run: Run, texts: Sequence[Sequence[int]]) -> list[str]:
    """Ids of the queries whose prompts some texts begin with."""
    queries = [query for split in run.config.adapter.splits for query in run.splits[split]]
    prompts = {query.id: tuple(run.tokens(query)[0]) for query in queries}
    return [name for text in texts for name, prompt in prompts.items() if tuple(text[: len(prompt)]) == prompt]


def _states(run: Run, samples: Sequence[Answered], stack: AdapterStack, seed: int | None) -> HiddenStateStream:
    """The states that these adapters have to do with: without first tokens where they have residuals of their own."""
    sequences = [(*prompt, *answer) for prompt, answer in samples]
    skip_first = stack.sink_Ld is not None
    return _stream(run, sequences, seed, skip_first)


def _stream(run: Run, sequences: Sequence[Sequence[int]], seed: int | None, skip_first: bool) -> HiddenStateStream:
    settings = run.config.adapter
    after_norm = settings.last_target == "final_norm"
    return HiddenStateStream(run.slm, sequences, settings.batch_tokens, seed, skip_first, after_norm)


def _moments(run: Run, samples: Sequence[Answered], stack: AdapterStack, path: Path) -> Moments:
    """The moments that adapters are solved from, kept now and then, so that it can be stopped."""
    moments = moments_for(stack)
    if path.exists():
        moments.load(load_file(path))
    stream = _states(run, samples, stack, None)
    left = range(moments.batches, len(stream))
    kept, cost = time.monotonic(), 0.0
    for number in track(left, "fitting adapters in closed form", len(left)):
        moments.add(stream.batch(0, number))
        begun = time.monotonic()
        # Of a wide SLM they are gigabytes.
        if begun - kept >= max(StepCheckpoints.seconds, _LEAST_FOR_ITS_COST * cost):
            with replacing(path) as temporary:
                save_file(moments.tensors(), temporary)
            kept = time.monotonic()
            cost = kept - begun
    return moments


def _first_residuals(run: Run, samples: Sequence[Answered]) -> torch.Tensor:
    """What each layer adds to the first token, which attends to nothing but itself; the mean where samples differ in it."""
    firsts = [prompt[:1] for prompt, _ in samples]
    states = torch.cat(list(_stream(run, firsts, None, skip_first=False)), dim=1).float()
    return (states[1:] - states[:-1]).mean(dim=1).cpu()


def harm(run: Run, stand_ins: Artifact | None) -> Artifact:
    """By how many nats a token the answers get less likely where a layer is pruned alone."""
    count = run.config.adapter.draw.probe_samples
    source = answers(run)
    config = {
        "model": run.model_identity,
        "probe_samples": count,
        "validation_share": run.config.adapter.validation_share,
        "seed": run.config.adapter.seed,
    }
    upstream = {**upstream_of(stand_ins), "answers": source.fingerprint}

    def build(folder: Path) -> dict[str, Any]:
        samples, _ = split_answers(run, source)
        probes = random.Random(run.config.adapter.seed).sample(samples, min(count, len(samples)))
        pieces = Pieces(folder, "harm")
        if not (folder / _HARM).exists():
            measured = _probe(run, probes, stand_ins, pieces)
            tokens = sum(tokens for tokens, _ in measured)
            full, *single = (sum(nats) / tokens for nats in zip(*(nats for _, nats in measured), strict=True))
            with replacing(folder / _HARM) as path:
                path.write_text(json.dumps([value - full for value in single]), encoding="utf-8")
        pieces.remove()
        return {"samples": len(probes)}

    return run.store.get_or_build("harm", HARM_VERSION, config, {}, upstream, build, resumable=True)


def _probe(run: Run, probes: Sequence[Answered], stand_ins: Artifact | None, pieces: Pieces) -> list[tuple[int, list[float]]]:
    """Of each probe the tokens of its answer, and its nats unpruned and with each layer pruned alone; it can be stopped."""
    configurations = [(), *((layer,) for layer in range(run.slm.num_layers))]
    measured: dict[int, tuple[int, list[float]]] = {}
    for piece in pieces.read():
        measured |= {position: (tokens, nats) for position, tokens, nats in json.loads(piece)}
    left = [position for position in range(len(probes)) if position not in measured]
    samples = [probes[position] for position in left]
    with pruner_of(run, stand_ins) as pruner:
        scored = score_configurations(run.slm, pruner, samples, configurations)
        batches = len(similar_samples(run.slm, samples))
        for places, scores in track(scored, "measuring the harm of each layer", batches):
            positions, tokens_B = [left[place] for place in places], scores[0].tokens_B.tolist()
            nats_BC = torch.stack([score.nats_B for score in scores], dim=1).tolist()
            some = list(zip(positions, tokens_B, nats_BC, strict=True))
            pieces.add(json.dumps(some))
            measured |= {position: (tokens, nats) for position, tokens, nats in some}
    return [measured[position] for position in range(len(probes))]


def accumulation(key: str, settings: DictConfig) -> int:
    """How many micro-batches make a step.

    Args:
        key: Where the settings stand, for the error message.
        settings: What has ``batch_size`` and ``micro_batch_size``.

    Raises:
        ValueError: If a step is no whole number of micro-batches.
    """
    size, micro = settings.batch_size, settings.micro_batch_size
    if micro < 1 or size < micro or size % micro:
        raise ValueError(
            f"{key}.batch_size={size} is no multiple of {key}.micro_batch_size={micro}; for example {key}.batch_size=8 "
            f"{key}.micro_batch_size=4"
        )
    return int(size // micro)
