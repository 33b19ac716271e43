"""The stage ``export``: a run's SLM, adapters and router as one `dynprune.DynamicModel`; the measured table is its card."""

import logging
import os
from pathlib import Path
from typing import Any

from dynprune.adapters.checkpoint import load_adapters
from dynprune.dynamic_model import DynamicModel
from dynprune.evaluation.run_results import has_table_of
from dynprune.router.checkpoint import load_router
from dynprune.router.policies import build_policy
from dynprune.stages.adapters import adapters
from dynprune.stages.evaluate import with_own_router
from dynprune.stages.router import ROUTER, router, router_layers
from dynprune.stages.run import Run, plain

log = logging.getLogger(__name__)
_KINDS = {"load_hf": "hf", "load_gguf": "gguf", "load_tiny": "tiny"}


def export(run: Run) -> Path:
    """Writes the model, and whatever it needs that is missing.

    Returns:
        Its folder, ``model/`` in the run's own.

    Raises:
        ValueError: ``export_router`` names no router of the table, or the SLM is loaded in a way that cannot be written down.
    """
    name = run.config.export_router
    methods = run.config.evaluation.routers
    if (name is None) == bool(methods) or (methods and name not in methods):
        allowed = ", ".join(methods) if methods else "null, which takes the router of method"
        raise ValueError(f"export_router={name} is no router of the table; allowed: {allowed}")
    chosen = run if name is None else with_own_router(run, name)
    # The first of the table's seeds, so that the model is one that the table has measured.
    seed = next(iter(run.config.evaluation.router_seeds), run.config.seed)
    trained = router(chosen, run.config.method if name is None else methods[name], seed)
    folder = run.folder / "model"
    if run.store.rank > 0:
        return folder
    network, extra = load_router(trained.folder / ROUTER, run.slm)
    stack = adapters(run)
    model = DynamicModel(
        run.slm,
        load_adapters(stack.folder) if stack is not None else None,
        network,
        build_policy(extra["policy"]),
        slm_source(run),
        router_layers(chosen),
        _card(run, extra["method"]),
    )
    model.save_pretrained(folder)
    log.info("wrote %s; use it by dynprune.DynamicModel.from_pretrained(%r)", os.path.relpath(folder), os.path.relpath(folder))
    return folder


def slm_source(run: Run) -> dict[str, Any]:
    """What rebuilds the run's SLM wherever it is loaded: which loader, and its arguments; of the Hub the commit."""
    settings: dict[str, Any] = plain(run.config.model)
    loader = settings.pop("_target_").rpartition(".")[2]
    if loader not in _KINDS:
        raise ValueError(f"model._target_ ends in {loader}, which an exported model cannot name; allowed: {', '.join(_KINDS)}")
    # What auto stood for in this run, and where a folder lies, whatever the machine and the place it is loaded in.
    settings["dtype"] = run.model_identity["dtype"]
    for key in ("name", "delta"):
        if settings.get(key) is not None and Path(settings[key]).is_dir():
            settings[key] = str(Path(settings[key]).resolve())
    if settings.get("name") is not None and not Path(settings["name"]).is_dir():
        # The commit, as far as it is known.
        settings["revision"] = run.model_identity["content"] or settings.get("revision")
    return {"kind": _KINDS[loader], "arguments": settings}


def _card(run: Run, method: str) -> str:
    # Another configuration's table is not this model's.
    measured_here = has_table_of(run.folder, plain(run.config), run.store.plugins, run.inputs)
    table = run.folder / "report" / "table.md"
    measured = table.read_text(encoding="utf-8") if measured_here else "Not measured: stage=evaluate writes the table.\n"
    return f"""---
library_name: dynprune
tags: [layer-pruning, function-calling]
---

# {run.slm.name}, pruned for each query

A small language model that leaves out other layers for each query. Adapters stand in for them; a router that was trained by
{method.upper()} chooses them before the model reads the prompt.

```python
from dynprune import DynamicModel

model = DynamicModel.from_pretrained("PATH_OR_HUB_ID")
model.generate("What is the weather in Oslo?", tools=[...], budget=0.1)
```

The base model is loaded by reference; this folder holds the adapters and the router.

## Measured

{measured}"""
