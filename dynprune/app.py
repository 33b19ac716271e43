"""The Hydra entry point ``dynprune``: composes the configuration and runs the stage that it names."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import rich
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.syntax import Syntax
from rich.tree import Tree

from dynprune.atomic import replacing
from dynprune.messages import quieten
from dynprune.paths import conf_dir

log = logging.getLogger(__name__)
# A disk that is full, or a folder that cannot be written to: no mistake of the program's.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# File systems allow 255 bytes; the job's number stands before it.
_LONGEST_NAME = 240


def folder_name(text: str) -> str:
    """As much of a text as the name of a folder holds, where it has no folders in it."""
    # A folder in a folder would be no job's; ∕ is no separator.
    return text.replace("/", "∕").encode()[:_LONGEST_NAME].decode(errors="ignore")


OmegaConf.register_new_resolver("folder_name", folder_name)


def _stages() -> Mapping[str, Callable[[Any], object]]:
    # Imported here, so that --help and shell completion do not wait for torch.
    from dynprune.stages.adapt import adapt
    from dynprune.stages.adapters import fit_adapters
    from dynprune.stages.bench import bench
    from dynprune.stages.compare import compare
    from dynprune.stages.explore import explore_splits
    from dynprune.stages.export import export
    from dynprune.stages.pairs import pairs
    from dynprune.stages.report import report
    from dynprune.stages.router import train_router
    from dynprune.stages.store import clean, list_artifacts
    from dynprune.stages.thesis_import import import_thesis

    return {
        "all": report,
        "adapt": adapt,
        "adapters": fit_adapters,
        "explore": explore_splits,
        "pairs": pairs,
        "router": train_router,
        "evaluate": report,
        "report": report,
        "export": export,
        "import": import_thesis,
        "compare": compare,
        "bench": bench,
        "list": list_artifacts,
        "clean": clean,
    }


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def main(config: DictConfig) -> None:
    """Runs the stage that the configuration names, with whatever it needs that is missing."""
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        run_stage(config, multirun)
    except (ValueError, InstantiationException) as error:
        # Hydra wraps what a target raises; the user's mistake is the sentence inside.
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not isinstance(cause, ValueError) or multirun or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        log.error("%s", cause)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_ROOM or multirun or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        log.error("%s; what is done is kept: once that is mended, the same command goes on from there", error)
        sys.exit(1)


def command_line() -> None:
    """The command ``dynprune``; where it ends on a name that there is not, it says the nearest one."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code == 1:
            from dynprune.suggestions import suggestions

            for sentence in suggestions(sys.argv[1:], conf_dir()):
                print(sentence, file=sys.stderr)
        raise


def run_stage(config: DictConfig, multirun: bool) -> None:
    """Runs the stage that a configuration names, with whatever it needs that is missing.

    Args:
        config: The composed configuration.
        multirun: Whether it is one job of a sweep.

    Raises:
        ValueError: If there is no such stage, or it cannot be run so.
    """
    stages = _stages()
    if config.stage not in stages:
        raise ValueError(f"stage={config.stage} is unknown; allowed: {', '.join(stages)}")
    if multirun and config.hardware.trainer.devices != 1:
        raise ValueError(
            f"hardware.trainer.devices={config.hardware.trainer.devices} cannot run in a multirun: each process that Lightning "
            "starts would start the whole sweep again; type hardware.trainer.devices=1, or run the jobs one by one"
        )
    from dynprune.evaluation.run_results import WITH_TABLE, has_table_of
    from dynprune.stages.run import Run, plain
    from dynprune.tracking import tracked

    run = Run(config)
    with_table = config.skip_completed and config.stage in WITH_TABLE
    if with_table and has_table_of(run.folder, plain(run.config), run.store.plugins, run.inputs):
        log.info("skipping %s, which has its table", os.path.relpath(run.folder))
        return
    quieten()
    _show(config)
    with tracked(run):
        stages[config.stage](run)


def _show(config: DictConfig) -> None:
    """Prints the configuration as a tree and keeps it, resolved, in the run's folder."""
    text = OmegaConf.to_yaml(config, resolve=True)
    tree = Tree("configuration", guide_style="dim")
    for key in config:
        branch = tree.add(str(key))
        value = config[key]
        shown = OmegaConf.to_yaml(value, resolve=True) if OmegaConf.is_config(value) else str(value)
        branch.add(Syntax(shown.rstrip(), "yaml", background_color="default"))
    rich.print(tree)

    with replacing(Path(config.paths.run) / "config.yaml") as path:
        path.write_text(text, encoding="utf-8")
