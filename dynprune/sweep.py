"""What a sweep does beyond running its jobs: it goes on where one fails, and ends with one comparison.

Hydra calls it (``hydra.callbacks``); it is constructed at every start, so what it needs is imported where it is used.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class CompareJobs(Callback):
    """Compares the jobs of a sweep; a job that failed is a line that says why."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Says in a sentence where the run's folder cannot be written to: Hydra would show a traceback.

        Raises:
            SystemExit: It cannot.
        """
        _check_writable(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Says the same of a sweep's folder.

        Raises:
            SystemExit: It cannot be written to.
        """
        self._began = _check_writable(Path(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Notes why a job failed, and lets the sweep go on: Hydra would end it without a comparison."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        from dynprune.evaluation.run_results import forget_failure, write_failure

        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status != JobStatus.FAILED:
            forget_failure(folder)
            return
        error: BaseException = job_return._return_value
        if isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__
        log.error("job %s failed: %s", config.hydra.job.num, error, exc_info=None if isinstance(error, ValueError) else error)
        write_failure(folder, error, config.seed)
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Writes and prints the comparison.

        Raises:
            SystemExit: A job failed.
        """
        from dynprune.evaluation.run_results import failed, is_run
        from dynprune.stages.compare import show_comparison

        folder = Path(config.hydra.sweep.dir)
        jobs = [path for path in folder.glob("*") if path.is_dir()]
        try:
            if compared := [path for path in jobs if is_run(path)]:
                show_comparison(compared, folder)
        except Exception:
            # Hydra would make a warning of it, and leave out what follows.
            log.exception("the jobs could not be compared")
        # Other sweeps may have failed in this folder before.
        if lost := [path for path in jobs if failed(path, since=self._began)]:
            again = f"hydra.sweep.dir={folder} skip_completed=true"
            log.error("jobs that failed: %d; to run them alone, type the same command with %s", len(lost), again)
            sys.exit(1)


def _check_writable(folder: Path) -> float:
    """Returns the time on the folder's file system, in seconds, whose clock need not be this machine's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        print(f"{error}; allowed: a folder that can be written to, type paths.outputs=FOLDER", file=sys.stderr)
        sys.exit(1)
