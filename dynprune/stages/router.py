"""The stage ``router``: trains a router by one method and keeps the checkpoint with the least loss on held-out data."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.data.datamodule import StreamData
from dynprune.data.filtering import keep_successful
from dynprune.data.rollouts import Rollout, completed_ids
from dynprune.data.streams import PairStream, RolloutStream
from dynprune.data.tasks import Query
from dynprune.evaluation.parts import RouterPart
from dynprune.evaluation.training_curves import CurveNotes, TrainingCurve, read_curve
from dynprune.methods.base import RouterTraining
from dynprune.router.budget import CountRule, likeliest
from dynprune.router.checkpoint import ROUTER_FILES, load_router, save_router
from dynprune.router.encoder import Encoder
from dynprune.router.encoders import build_encoder
from dynprune.router.inputs import RouterInputs
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import Policy, ValuePolicy, build_policy
from dynprune.router.router import Router
from dynprune.slm.loading import is_another
from dynprune.stages.checkpoints import (
    BestCheckpoint,
    StepCheckpoints,
    StepSeeds,
    best_of,
    epoch_checkpoints,
    last_of,
)
from dynprune.stages.explore import explore
from dynprune.stages.pairs import PAIRS, pairs
from dynprune.stages.part_report import report_parts
from dynprune.stages.run import Run, content_digest, plain

log = logging.getLogger(__name__)
VERSION = 5
_MONITORED = "validation/loss"
ROUTER = "router"
CURVE = "curve.csv"
"""Where an artifact keeps how its router learned."""


def train_router(run: Run) -> None:
    """Trains the router of the run's method, and notes in the run's folder what that came to."""
    check_fit(run, run.config.method)
    artifact = router(run)
    if run.store.rank > 0:
        return
    counts = artifact.manifest["counts"]
    if not counts:
        # A ready router was not trained here.
        report_parts(run, {})
        return
    report_parts(run, {"router": RouterPart(**counts)}, read_curves({run.config.method.name: [artifact]}))


def read_curves(routers: Mapping[str, Sequence[Artifact]]) -> dict[str, list[TrainingCurve]]:
    """How routers learned, by method; a ready one has no curve.

    Args:
        routers: By method, the router of each seed.
    """
    paths = {name: [artifact.folder / CURVE for artifact in of_seeds] for name, of_seeds in routers.items()}
    return {
        name: [read_curve(path) for path in of_seeds] for name, of_seeds in paths.items() if all(map(Path.exists, of_seeds))
    }


def router(run: Run, method: DictConfig | None = None, seed: int | None = None) -> Artifact:
    """Trains a router.

    Args:
        run: The run.
        method: The method's configuration; the run's by default.
        seed: Seed of its heads and of the order of its data; the run's by default.
    """
    method = run.config.method if method is None else method
    seed = run.config.seed if seed is None else seed
    if run.config.router.folder is not None:
        return _ready(run)
    source = pairs(run) if learns_from(method) == "pairs" else explore(run)
    held_out = pairs(run, "validation")
    start = _start(run, method, seed)
    hardware = run.config.hardware.trainer
    config = {
        # Of a router that is trained there is no folder.
        "router": {key: value for key, value in plain(run.config.router).items() if key != "folder"}
        | {"encoder": run.encoder_identity},
        "encoder": content_digest(run.config.router.encoder.name_or_path),
        "method": plain(method) | _method_version(method),
        "num_layers": run.slm.num_layers,
        "precision": hardware.precision,
        # Each process has batches of its own: several of them learn from larger steps.
        "devices": hardware.devices,
        "seed": seed,
    }
    if hardware.devices != 1:
        # Their processes once had an order each.
        config["one_order"] = True
    upstream = {"source": source.fingerprint, "validation": held_out.fingerprint}
    if start is not None:
        upstream["start"] = start.fingerprint

    def build(folder: Path) -> dict[str, Any]:
        return _train(run, method, seed, folder, source, held_out, start)

    return run.store.get_or_build(
        "router", VERSION, config, {}, upstream, build, resumable=hardware.devices == 1, distributed=hardware.devices != 1
    )


def _ready(run: Run) -> Artifact:
    """The router in ``router.folder``, instead of training one."""
    source = run.config.router.folder

    def build(folder: Path) -> dict[str, Any]:
        # Read first: what is no router is said, and not copied.
        load_router(Path(source), run.slm)
        shutil.copytree(source, folder / ROUTER)
        return {}

    config = {"folder": content_digest(source, ROUTER_FILES)}
    return run.store.get_or_build("router", VERSION, config, {}, {}, build, resumable=False)


def _train(
    run: Run, method: DictConfig, seed: int, folder: Path, source: Artifact, held_out: Artifact, start: Artifact | None
) -> dict[str, Any]:
    hardware = run.config.hardware.trainer
    # Processes that train together have clocks of their own, by which each would write checkpoints at another step.
    alone = hardware.devices == 1
    lightning.seed_everything(seed, workers=True)
    module = new_training(run, method, None if start is None else load_router(start.folder / ROUTER, run.slm)[0].train())
    network, policy = module.router, module.policy
    places = folder / "checkpoints"
    curve = CurveNotes()
    checkpoint = BestCheckpoint(places, _MONITORED)
    trainer = run.trainer(
        f"router-{method.name}",
        folder,
        [StepSeeds(seed), curve, checkpoint, *([epoch_checkpoints(places), StepCheckpoints(places)] if alone else [])],
        max_epochs=method.epochs,
        devices=hardware.devices,
        strategy=hardware.strategy,
    )
    data = _data(run, method, seed, source, held_out, network, policy)
    trainer.fit(module, data, ckpt_path=last_of(places) if alone else None)
    best = best_of(checkpoint)
    # What training does not change is not in it.
    unexpected = module.load_state_dict(best["state_dict"], strict=False).unexpected_keys
    assert not unexpected, f"the checkpoint has {unexpected}"
    trainer.validate(module, data, verbose=False)
    # Of held-out pairs, the share in which the winner is the likelier configuration.
    preferred = float(trainer.callback_metrics["validation/rewards/accuracies"])
    if not trainer.is_global_zero:
        return {}
    curve.write(folder / CURVE)
    save_router(network, folder / ROUTER, {"policy": policy.config(), "slm": run.slm.name, "method": method.name})
    return {
        "best_epoch": int(best["epoch"]),
        "validation_loss": float(checkpoint.best_model_score or 0),
        "preference_accuracy": preferred,
    }


def _start(run: Run, method: DictConfig, seed: int) -> Artifact | None:
    """The trained router that the method starts from, if it wants one."""
    start = method.get("start")
    if start is None:
        return None
    if not isinstance(start, DictConfig) or "module" not in start:
        raise ValueError(
            f"method.start={start} is no method; allowed: null, or an option of the group method: type "
            "+method@method.start=fbc (method@method.start=fbc where the method starts from one already)"
        )
    return router(run, start, seed)


def learns_from(method: DictConfig) -> str:
    """What a method learns from, see `RouterTraining.learns_from`."""
    return _training_class(method).learns_from


def _method_version(method: DictConfig) -> dict[str, int]:
    """What identifies a method's code in an artifact, where it has changed since the first version."""
    version = _training_class(method).version
    return {} if version == 1 else {"version": version}


def _training_class(method: DictConfig) -> type[RouterTraining]:
    found: type[RouterTraining] = get_class(method.module._target_)
    return found


def _data(
    run: Run, method: DictConfig, seed: int, source: Artifact, held_out: Artifact, network: Router, policy: Policy
) -> StreamData:
    """What the method learns from, and what it is validated on: held-out data of its own kind, and pairs in any case."""
    kind = learns_from(method)
    validation: list[PairStream | RolloutStream] = [PairStream(held_out.folder / PAIRS, policy.allows, None)]
    if kind == "pairs":
        training: PairStream | RolloutStream = PairStream(source.folder / PAIRS, policy.allows, seed)
    else:
        keep: Callable[[Sequence[Rollout]], list[Rollout]] = list
        if kind != "scores":
            keep = partial(keep_successful, min_score=method.min_score, min_share_of_deepest=method.min_share_of_deepest)
        stream = partial(RolloutStream, allows=policy.allows, keep=keep, only_kept=kind == "successes")
        training = stream(source.folder, seed=seed)
        # Shuffled, once and for all: KTO compares a rollout with its neighbour, which shall be another query's as in training.
        validation.append(stream(explore(run, "validation").folder, seed=seed))
    explored = {split: completed_ids(explore(run, split).folder) for split in ("train", "validation")}
    texts = {
        query.id: network.encoder.render(query)
        for split, ids in explored.items()
        for query in run.splits[split]
        if query.id in ids
    }
    return StreamData(
        training,
        validation,
        batch_size=method.batch_size,
        collate=_collate(RouterInputs(network, texts)),
        resumable=run.config.hardware.trainer.devices == 1,
    )


@dataclass(frozen=True)
class TrainedRouter:
    """A router in use.

    Attributes:
        network: The router.
        policy: Its policy.
        device: Where it lies.
    """

    network: Router
    policy: Policy
    device: torch.device

    @torch.inference_mode()
    def outputs(self, query: Query) -> RouterOutputs:
        """What it says of a query."""
        encoder = self.network.encoder
        features = encoder.tokenize([encoder.render(query)])
        outputs: RouterOutputs = self.network(
            self.network.encode({name: tensor.to(self.device) for name, tensor in features.items()})
        )
        return outputs

    def chooser(self, count: CountRule = likeliest) -> Callable[[Query], Sequence[int]]:
        """What chooses the layers to prune for a query: the mode of the policy, with as many layers as a rule says."""

        def choose(query: Query) -> list[int]:
            mask_BL = self.policy.mode(self.outputs(query), count)
            layers: list[int] = mask_BL[0].nonzero()[:, 0].tolist()
            return layers

        return choose


def trained_router(run: Run, artifact: Artifact) -> TrainedRouter:
    """The router that an artifact holds, on the SLM's device."""
    network, extra = load_router(artifact.folder / ROUTER, run.slm)
    if network.num_layers != run.slm.num_layers:
        raise ValueError(
            f"router.folder={run.config.router.folder} chooses among {network.num_layers} layers, but {run.slm.name} has "
            f"{run.slm.num_layers}; allowed: a router for this SLM, or router.folder=null, which trains one"
        )
    if run.config.router.folder is not None and is_another(other := extra.get("slm"), run.slm):
        log.warning(
            "router.folder=%s holds a router that learned what %s can do without, but the SLM is %s",
            run.config.router.folder,
            other,
            run.slm.name,
        )
    return TrainedRouter(network.to(run.slm.device), build_policy(extra["policy"]), run.slm.device)


def router_layers(run: Run) -> float:
    """What a pass of the run's router costs, in layers of the SLM: those that it runs itself, if it reads the SLM's states."""
    settings = run.config.router
    costs = {"query": run.config.evaluation.router_cost_layers, "slm_states": settings.slm_layers, "none": 0.0}
    return float(costs[settings.inputs])


def new_router(run: Run, method: DictConfig | None = None) -> Router:
    """A router of the run's configuration with random heads, for a method; the run's by default."""
    settings = run.config.router
    if settings.ratio not in ("normal", "categorical"):
        raise ValueError(f"router.ratio={settings.ratio!r} is unknown; allowed: normal, categorical")
    return Router(
        _new_encoder(run),
        run.slm.num_layers,
        settings.head_hidden_dim,
        settings.log_std_min,
        settings.log_std_max,
        new_policy(run, method).k_max + 1 if settings.ratio == "categorical" else None,
    )


def _new_encoder(run: Run) -> Encoder:
    settings = run.config.router
    arguments = {"query": run.encoder_settings, "slm_states": {"first_layers": settings.slm_layers}}
    return build_encoder(settings.inputs, arguments.get(settings.inputs, {}), run.slm)


def check_fit(run: Run, method: DictConfig) -> None:
    """Lets a method say what it does not take of the run's router, before anything is explored or trained."""
    if run.config.router.folder is None:
        new_training(run, method)


def new_training(run: Run, method: DictConfig, network: Router | None = None) -> RouterTraining:
    """The training of a router by a method, which says what does not fit; of one with random heads, if none is given."""
    network = new_router(run, method) if network is None else network
    training: RouterTraining = instantiate(
        method.module, router=network, policy=new_policy(run, method), optimizer=instantiate(method.optimizer)
    )
    return training


def new_policy(run: Run, method: DictConfig | None = None) -> Policy:
    """The policy that a method needs, or else that of the router's configuration.

    Args:
        run: The run.
        method: The method's configuration; the run's by default.
    """
    settings = run.config.router
    own = plain((run.config.method if method is None else method).policy)
    if own is None:
        if settings.policy == ValuePolicy.name:
            raise ValueError("router.policy=value searches a reward that only one method predicts; type method=value")
        own = {"name": settings.policy} | (plain(settings.sinkhorn) if settings.policy == "sinkhorn" else {})
    return build_policy(
        {
            "num_layers": run.slm.num_layers,
            "prunable_layers": _prunable_layers(run),
            "k_max": settings.k_max,
            **own,
        }
    )


def _prunable_layers(run: Run) -> list[int] | None:
    """The layers that may be pruned: none of those that the router reads itself."""
    settings = run.config.router
    layers: list[int] | None = plain(settings.prunable_layers)
    if settings.inputs != "slm_states":
        return layers
    if layers is None:
        return list(range(settings.slm_layers, run.slm.num_layers))
    if read := [layer for layer in layers if layer < settings.slm_layers]:
        raise ValueError(
            f"router.prunable_layers={layers} names layer {read[0]}, but the router reads the SLM's states after its first "
            f"router.slm_layers={settings.slm_layers} layers, so these always run; allowed: layers from {settings.slm_layers} "
            "on, or null for all of them"
        )
    return layers


def _collate(inputs: RouterInputs) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {key: [item[key] for item in items] for key in items[0]}
        ids = columns.pop("id")
        batch: dict[str, Any] = {"ids": ids, "inputs": inputs(ids)}
        for key, values in columns.items():
            if key.endswith("_L"):
                batch[key.replace("_L", "_BL")] = torch.stack(values)
            else:
                batch[f"{key}_B"] = torch.tensor(values)
        return batch

    return collate
