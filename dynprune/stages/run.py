"""One run: its configuration, its artifacts, and the parts that several stages need, each loaded once."""

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from dynprune.artifacts import USES, Store
from dynprune.data.prompts import answer_tokens, prompt_tokens
from dynprune.data.splits import select, split_by_function
from dynprune.data.tasks import Query
from dynprune.plugins import concerned, import_plugins
from dynprune.slm.adaptation import DELTA_FILES, trained_functions
from dynprune.slm.loading import SLM, commit_of, delta_folder, resolve_dtype
from dynprune.stages.checkpoints import WholeCheckpoints
from dynprune.stages.finite_loss import FiniteLoss, IdsOf, stated_ids
from dynprune.stages.progress import TrainingBar

log = logging.getLogger(__name__)
Made = TypeVar("Made")
# Mappings of what a table compares, by its name there, a router's settings after the routers.
_NAMED = (
    "evaluation.routers",
    "evaluation.router_settings",
    "evaluation.adapter_ablation.adapters",
    "evaluation.lossless",
)
# Whole numbers, and the smallest that makes sense.
_LEAST = {
    "seed": 0,
    "adapter.seed": 0,
    "exploration.seed": 0,
    "adapter.max_samples": 1,
    "adapt.families": 1,
    "adapt.family_size": 1,
    "evaluation.latency.queries": 0,
}
# The SLM that was loaded last, by what identifies it.
_loaded: dict[str, SLM] = {}
_MIXED_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


class Run:
    """What a run was asked for, and what its stages share.

    Attributes:
        config: The composed configuration.
        folder: The run's own folder.
        store: The artifacts.
        made: What stages have made already, see `once_a_run`.
    """

    def __init__(self, config: DictConfig) -> None:
        """Binds the configuration; nothing is loaded yet.

        Args:
            config: The composed configuration.
        """
        self.config = config = _without_dropped(config)
        _check_numbers(config)
        _check_devices(config.hardware)
        self.folder = Path(config.paths.run)
        plugins = import_plugins(config.plugins)
        rank = getattr(rank_zero_only, "rank", 0)
        concerns = concerned(list(plugins), plain(config))
        self.store = Store(Path(config.paths.artifacts), rank, self.folder / USES, plugins, concerns)
        self.made: dict[tuple[str, ...], Any] = {}

    def with_changes(self, config: DictConfig) -> "Run":
        """A run of another configuration of the same SLM and data, which it shares with this one."""
        other = Run(config)
        vars(other).update(slm=self.slm, splits=self.splits, model_identity=self.model_identity)
        return other

    @cached_property
    def slm(self) -> SLM:
        """The SLM, loaded; the jobs of a sweep that run in one process share it."""
        key = json.dumps([self.model_identity, self.config.hardware.device], sort_keys=True)
        if key not in _loaded:
            # One at a time: another job's makes room.
            _loaded.clear()
            log.info("loading the SLM")
            _loaded[key] = instantiate(self.config.model, device=self.config.hardware.device)
        return _loaded[key]

    def release_slm(self) -> None:
        """Makes room for another SLM; asked for again, this one is loaded again."""
        vars(self).pop("slm", None)
        _loaded.clear()

    @cached_property
    def _dealt(self) -> dict[str, list[Query]]:
        """All queries of each split."""
        return split_by_function(
            instantiate(self.config.data.source), plain(self.config.data.splits), self.config.data.split_seed
        )

    @cached_property
    def held_out_functions(self) -> frozenset[str]:
        """Functions that queries of the splits call, those of ``adapt`` left out: no SLM is trained on them."""
        return frozenset().union(*(q.functions for name, members in self._dealt.items() if name != "adapt" for q in members))

    @cached_property
    def splits(self) -> dict[str, list[Query]]:
        """The queries of each split, in an order that the split's seed fixes."""
        seed = self.config.data.split_seed
        splits = select(self._dealt, plain(self.config.data.only.categories), self.config.data.only.max_chars)
        for members in splits.values():
            random.Random(seed).shuffle(members)
        self._leave_out_trained(splits)
        log.info("queries: %s", ", ".join(f"{name} {len(members)}" for name, members in splits.items()))
        return splits

    def _leave_out_trained(self, splits: dict[str, list[Query]]) -> None:
        """Takes out of all splits but ``adapt`` what calls a function that the SLM's delta was trained on.

        With the data and the splits that the delta was trained with, that is nothing.
        """
        delta = self.config.model.get("delta")
        if delta is None:
            return
        trained = trained_functions(delta_folder(delta))
        for name, members in splits.items():
            seen = [query for query in members if query.functions & trained] if name != "adapt" else []
            if seen:
                log.warning("left %d queries out of the %s split: the SLM was trained on their functions", len(seen), name)
                splits[name] = [query for query in members if not query.functions & trained]

    def queries(self, split: str, limit: int | None, limit_key: str) -> list[Query]:
        """The first queries of a split.

        Args:
            split: Name of the split.
            limit: How many, at most; ``None`` for all.
            limit_key: The configuration key that says so, for the error message.

        Raises:
            ValueError: If the limit is below 1, or the split is empty.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"{limit_key}={limit} leaves no query; allowed: null for all, or at least 1")
        queries = self.splits[split][:limit]
        if not queries:
            raise ValueError(
                f"the {split} split is empty; give it a share, for example data.splits.{split}=0.2, or more of its queries: "
                "data.only.max_chars and data.only.categories leave some out, as does a delta that was trained on them"
            )
        return queries

    @property
    def shown_config(self) -> dict[str, Any]:
        """The configuration as reports show it: to others, whom the machine's folders do not concern."""
        # Other keys are made of this one.
        shown: dict[str, Any] = plain(OmegaConf.merge(self.config, {"paths": {"run": os.path.relpath(self.folder)}}))
        return shown

    @property
    def shared_bytes(self) -> int:
        """Memory for what configurations of one prompt share, in bytes."""
        return int(self.config.hardware.shared_gib * 2**30)

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        """What identifies the SLM: its configuration, the dtype it gets here, and the content of what that names.

        Of a repository on the Hub that is the commit: a branch may stand for another one tomorrow.
        """
        identity: dict[str, Any] = plain(self.config.model)
        identity["dtype"] = resolve_dtype(identity["dtype"], self.config.hardware.device)
        if identity.get("delta") is not None:
            identity["delta_content"] = content_digest(str(delta_folder(identity["delta"])), DELTA_FILES)
        name = identity.get("name")
        identity["content"] = content_digest(name)
        if name is not None and identity["content"] is None:
            identity["content"] = commit_of(name, identity.get("revision"))
        return identity

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Hashes of what the configuration names and what can change under its name: queries, and what lies in folders."""
        queries = [query for members in self.splits.values() for query in members]
        config = self.config
        files = {
            "slm": self.model_identity["content"],
            "delta": self.model_identity.get("delta_content"),
            "adapters": content_digest(config.adapter.get("folder")),
            "rollouts": content_digest(config.exploration.folder),
            "router": content_digest(config.router.folder),
            "encoder": content_digest(config.router.encoder.name_or_path),
        }
        return {"queries": digest(queries)["sha256"], **{key: value for key, value in files.items() if value is not None}}

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """``router.encoder``, with the number format that the encoder gets here."""
        settings: dict[str, Any] = plain(self.config.router.encoder)
        if settings["dtype"] is None:
            settings["dtype"] = "float32" if settings["trainable"] else self.model_identity["dtype"]
        return settings

    @property
    def encoder_identity(self) -> dict[str, Any]:
        """What identifies the encoder in an artifact; one in float32 as when there was no choice."""
        settings = self.encoder_settings
        if settings["dtype"] == "float32":
            del settings["dtype"]
        return settings

    @property
    def mixed_precision(self) -> str:
        """Lightning's precision for training in the SLM: products in its dtype, what is trained in float32."""
        return _MIXED_PRECISION[self.model_identity["dtype"]]

    def max_new_tokens(self, queries: Sequence[Query]) -> int:
        """A token limit for answers to some queries, by the longest reference answer."""
        longest = max(len(answer_tokens(self.slm.tokenizer, query)) for query in queries)
        return round(float(self.config.evaluation.max_tokens_margin) * (longest + 1))

    def tokens(self, query: Query) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A query's prompt and reference answer as the SLM's tokens, the answer without a stop token."""
        return prompt_tokens(self.slm.tokenizer, query), answer_tokens(self.slm.tokenizer, query)

    def trainer(
        self,
        name: str,
        folder: Path,
        callbacks: Sequence[Callback],
        ids_of: IdsOf = stated_ids,
        **changes: Any,
    ) -> lightning.Trainer:
        """Lightning's trainer of the hardware's configuration, on one device unless the stage says otherwise.

        Args:
            name: What is trained, for the loggers.
            folder: Where checkpoints go by default.
            callbacks: Callbacks beside the progress bar and the one that ends a training whose loss is no number.
            ids_of: See `FiniteLoss`.
            changes: Arguments of the trainer that are the stage's own.
        """
        configured: list[Logger] = [
            # A job has one run there, in which several trainings stand beside each other.
            instantiate(own, name=name, **({"prefix": name} if logger == "wandb" else {}))
            for logger, own in self.config.logger.items()
            if own is not None
        ]
        hardware = instantiate(self.config.hardware.trainer, _convert_="all")
        arguments = {**hardware, "devices": 1, "strategy": "auto", **changes}
        return lightning.Trainer(
            default_root_dir=folder,
            logger=configured or False,
            callbacks=[TrainingBar(), FiniteLoss(name, ids_of), *callbacks],
            plugins=[WholeCheckpoints()],
            enable_model_summary=False,
            # The streams draw a new order for each epoch when their loader is made.
            reload_dataloaders_every_n_epochs=1,
            log_every_n_steps=1,
            **arguments,
        )


def _check_numbers(config: DictConfig) -> None:
    """Refuses whole numbers that are none, or too small, before anything is computed.

    Raises:
        ValueError: Names the first of them.
    """
    methods = ["method", *(f"evaluation.routers.{name}" for name in config.evaluation.routers)]
    least = _LEAST | {f"{method}.{key}": 1 for method in methods for key in ("epochs", "batch_size")}
    for key, smallest in least.items():
        value = OmegaConf.select(config, key)
        if value is not None and (not isinstance(value, int) or value < smallest):
            raise ValueError(f"{key}={value} is not allowed; allowed: whole numbers from {smallest} on")


def _check_devices(hardware: DictConfig) -> None:
    """Checks that the devices of the SLM and of the trainer are there.

    Raises:
        ValueError: If torch knows no such device, or it is a GPU that torch does not see.
    """
    try:
        kind = torch.device(hardware.device).type
    except RuntimeError as error:
        raise ValueError(
            f"hardware.device={hardware.device} is unknown; allowed: cpu, cuda, or cuda:1 for the second GPU"
        ) from error
    asked = {"device": hardware.device} if kind == "cuda" else {}
    if hardware.trainer.accelerator in ("gpu", "cuda"):
        asked["trainer.accelerator"] = hardware.trainer.accelerator
    for key, value in asked.items():
        if not torch.cuda.is_available():
            raise ValueError(f"hardware.{key}={value} needs a GPU, and torch sees none here; type hardware=cpu")


def _without_dropped(config: DictConfig) -> DictConfig:
    """The configuration without what a preset names and the user, or another preset, sets to null."""
    config = config.copy()
    dropped: set[str] = set()
    for key in _NAMED:
        entries = plain(OmegaConf.select(config, key)) or {}
        dropped |= {name for name, entry in entries.items() if entry is None and key == "evaluation.routers"}
        kept = [name for name, entry in entries.items() if entry is not None]
        if key == "evaluation.router_settings":
            kept = [name for name in kept if name not in dropped]
        OmegaConf.update(config, key, OmegaConf.masked_copy(OmegaConf.select(config, key), kept) if kept else {}, merge=False)
    return config


def once_a_run(stage: Callable[..., Made]) -> Callable[..., Made]:
    """Remembers what a stage made, for the stages of the same run that ask again."""

    @wraps(stage)
    def remembered(run: Run, *arguments: str) -> Made:
        key = (stage.__name__, *arguments)
        if key not in run.made:
            run.made[key] = stage(run, *arguments)
        made: Made = run.made[key]
        return made

    return remembered


def plain(config: Any) -> Any:
    """A configuration node as plain dicts and lists, resolved; a plain value as it is."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def portable_config(run: Run) -> DictConfig:
    """The run's configuration for another process, where Hydra's own values are not known."""
    return OmegaConf.create(plain(run.config))


def content_digest(place: str | None, names: Collection[str] | None = None) -> str | None:
    """A hash of the files in a local folder; ``None`` for what is no folder here, such as a Hub id.

    Args:
        place: The folder.
        names: Patterns of the names of the files that count, where the others cannot change a result; ``None`` for all.
    """
    if place is None or not Path(place).is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(path for path in Path(place).rglob("*") if path.is_file()):
        if names is not None and not any(fnmatch(path.name, name) for name in names):
            continue
        total.update(str(path.relative_to(place)).encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def digest(queries: Sequence[Query]) -> Mapping[str, Any]:
    """What identifies a list of queries: their number and a hash of their contents."""
    text = json.dumps([asdict(query) for query in queries], sort_keys=True)
    return {"queries": len(queries), "sha256": hashlib.sha256(text.encode()).hexdigest()}
