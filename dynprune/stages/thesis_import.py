"""The stage ``import``: the thesis's published adapters, routers and rollouts, turned into files that this project reads.

The layout is that of the thesis's scripts: ``adapter_{i}.pth`` with layer1 and layer2; a router's state with ``bert.*`` and the
heads; data sets as ``save_to_disk`` writes them, with id, pruned_layers, score and perhaps output. Sizes are read from the
files. Nothing in them is executed: states are read as weights alone.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from dynprune.adapters.checkpoint import load_adapters, save_adapters
from dynprune.data.rollouts import Rollout, RolloutWriter, by_query
from dynprune.evaluation.table import score_scale
from dynprune.router.checkpoint import save_router
from dynprune.router.encoder import TextEncoder
from dynprune.router.policies import build_policy
from dynprune.router.router import Router
from dynprune.stages.run import Run, plain

log = logging.getLogger(__name__)
_HEADS = ("layers_hidden", "layers_score", "ratio_hidden", "ratio_mu", "ratio_log_std")
_ENCODER = "bert."
_STATES = ("*.pth", "*.pt", "*.bin", "*.safetensors")
_COLUMNS = {"id", "pruned_layers", "score"}


def import_thesis(run: Run) -> Path:
    """Imports whatever there is at ``source``.

    Returns:
        The folder, ``imported/`` in the run's own, with ``adapters/…``, ``routers/…`` and ``rollouts/…``.

    Raises:
        ValueError: ``source`` is not given or not to be had, or holds nothing that can be imported.
    """
    source = _source(run.config.source, run.config.source_revision)
    target = run.folder / "imported"
    written = [*_adapters(source, target), *_routers(run, source, target)]
    written += _rollouts(run, source, target, _num_layers(target))
    if not written:
        raise ValueError(
            f"source={run.config.source} holds nothing to import; allowed: adapter_0.pth to adapter_{{L-1}}.pth, a router's "
            f"state with {_HEADS[1]}.weight, data sets of save_to_disk with {', '.join(sorted(_COLUMNS))}"
        )
    for path, what in written:
        log.info("imported %s: %s", what, os.path.relpath(path))
    return target


def _source(source: str | None, revision: str | None) -> Path:
    if source is None:
        raise ValueError("stage=import needs source, a folder or a Hub id; type source=sinap/dynamic-pruning")
    if Path(source).is_dir():
        return Path(source)
    reasons = []
    # The thesis's rollouts are a repository of the kind for data sets, whose ids are their own.
    for kind in ("model", "dataset"):
        try:
            return Path(snapshot_download(source, repo_type=kind, revision=revision))
        except (OSError, ValueError) as error:
            reasons.append(f"as a {kind}: {str(error).splitlines()[0]}")
    raise ValueError(
        f"source={source!r} is neither a folder nor in the local cache, and the Hub did not give revision {revision} "
        f"({'; '.join(reasons)}); allowed: a folder, or a Hub id; type: hf download {source} --repo-type model, or dataset"
    )


def _adapters(source: Path, target: Path) -> Iterator[tuple[Path, str]]:
    for first in sorted(source.rglob("adapter_0.pth")):
        stack = load_adapters(first.parent)
        folder = target / "adapters" / _name(first.parent, source)
        # Whose they are is not in the files.
        save_adapters(stack, folder, "")
        yield folder, f"adapters of {stack.num_layers} layers, width {stack.hidden_size}, bottleneck {stack.bottleneck}"


def _routers(run: Run, source: Path, target: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(path for pattern in _STATES for path in source.rglob(pattern) if not path.stem.startswith("adapter_")):
        state = _state(path)
        if f"{_HEADS[1]}.weight" not in state:
            continue
        router = _router(run, path, state)
        folder = target / "routers" / _name(path.with_suffix(""), source)
        settings = run.config.router
        own = {"name": settings.policy} | (plain(settings.sinkhorn) if settings.policy == "sinkhorn" else {})
        sizes = {"num_layers": router.num_layers, "prunable_layers": plain(settings.prunable_layers), "k_max": settings.k_max}
        save_router(router, folder, {"policy": build_policy({**sizes, **own}).config(), "slm": "", "method": "imported"})
        yield folder, f"a router for {router.num_layers} layers, heads of width {router.head_hidden_dim}"


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    # Some scripts keep the optimiser's state beside the model's.
    for key in ("state_dict", "model_state_dict"):
        if isinstance(state, Mapping) and key in state:
            state = state[key]
    return state if isinstance(state, Mapping) else {}


def _router(run: Run, path: Path, state: Mapping[str, torch.Tensor]) -> Router:
    settings = run.config.router
    missing = [f"{head}.{part}" for head in _HEADS for part in ("weight", "bias") if f"{head}.{part}" not in state]
    if missing:
        raise ValueError(f"{path} lacks {missing[:3]}; a router of the thesis has the heads {', '.join(_HEADS)}")
    encoder_state = {name.removeprefix(_ENCODER): value for name, value in state.items() if name.startswith(_ENCODER)}
    # The thesis trained its encoder with the heads.
    frozen = {**run.encoder_settings, "trainable": False}
    encoder = TextEncoder(**(frozen | {"trainable": True, "dtype": "float32"} if encoder_state else frozen))
    num_layers = len(state["layers_score.bias"])
    router = Router(encoder, num_layers, len(state["layers_hidden.bias"]), settings.log_std_min, settings.log_std_max)
    heads = {name: state[name] for head in _HEADS for name in (f"{head}.weight", f"{head}.bias")}
    # A pooler is in the files, and of no use.
    known = encoder.model.state_dict().keys()
    own = {f"encoder.model.{name}": value for name, value in encoder_state.items() if name in known}
    try:
        lacking, _ = router.load_state_dict(heads | own, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(
            f"{path} does not fit router.encoder.name_or_path={settings.encoder.name_or_path!r}: {reason}"
        ) from error
    if encoder_state and lacking:
        raise ValueError(f"{path} lacks {lacking[:3]} of router.encoder.name_or_path={settings.encoder.name_or_path!r}")
    return router.eval()


def _num_layers(target: Path) -> int | None:
    """L, which the thesis's rollouts do not say, of what was imported with them."""
    for path in sorted(target.rglob("adapters.json")) + sorted(target.rglob("router.json")):
        return int(json.loads(path.read_text(encoding="utf-8"))["num_layers"])
    return None


def _rollouts(run: Run, source: Path, target: Path, num_layers: int | None) -> Iterator[tuple[Path, str]]:
    for marker in sorted(source.rglob("dataset_info.json")):
        data = load_from_disk(str(marker.parent))
        if not isinstance(data, Dataset) or not set(data.column_names) >= _COLUMNS:
            log.info("left out %s, which is no table of rollouts", marker.parent)
            continue
        folder = target / "rollouts" / _name(marker.parent, source)
        rollouts = sorted((_rollout(record) for record in data), key=lambda rollout: rollout.id)
        _check_scores(marker.parent, [rollout.score for rollout in rollouts], run.config.exploration.score)
        layers = num_layers or run.slm.num_layers
        writer = RolloutWriter(folder, layers, run.config.exploration.score)
        # What an earlier import wrote stays.
        writer.append([one for group in by_query(rollouts) if group[0].id not in writer.completed_ids for one in group])
        whose = f"an SLM with {layers} layers" + ("" if num_layers else ", as model has: the files do not say")
        yield folder, f"{len(rollouts)} rollouts of {len(writer.completed_ids)} queries of {whose}"


def _check_scores(folder: Path, scores: Sequence[float], name: str) -> None:
    """Refuses scores that are not those that they are said to be.

    Raises:
        ValueError: If one lies where that score cannot.
    """
    if score_scale(name) != 1 and scores and (min(scores) < 0 or max(scores) > 1):
        raise ValueError(
            f"{folder} has scores from {min(scores):g} to {max(scores):g}, but exploration.score={name} goes from 0 to 1; the "
            "thesis's searches score by partial match: type exploration.score=partial_match"
        )


def _rollout(record: Mapping[str, Any]) -> Rollout:
    layers = tuple(sorted(record["pruned_layers"]))
    return Rollout(str(record["id"]), layers, float(record["score"]), str(record.get("output", "")))


def _name(path: Path, source: Path) -> str:
    """A name for what lies somewhere below the source."""
    relative = path.relative_to(source)
    return "-".join(relative.parts) or path.resolve().name
