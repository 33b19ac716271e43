"""Folders of runs with figures that can be counted by hand."""

import json

from dynprune.data.tasks import Query
from dynprune.evaluation.run_results import read_run, write_queries

SCORES = ("json_match", "ast_match", "parse_rate", "name_match", "ratio_function_calls", "partial_match")


def asked(number):
    """The query of a number."""
    messages = ({"role": "user", "content": f"Add {number}.\u2028<b>Now</b> \ud800"},)
    return Query(f"q{number}", "simple", messages, (), ({"name": "add", "arguments": {"a": number}},), ())


def write_run(folder, overrides, rows, seeds=(), layers=None, speedup=0.1, lossless=(), num_layers=None):
    """A run's folder; rows: by name, whether each answer is right, and what was said; with L all that is written now."""
    (folder / "report/samples").mkdir(parents=True)
    layers = layers or {}
    records = []
    for name, right in rows.items():
        samples = [
            {
                "id": f"q{i}",
                "output": f"{name} {r}" if name != "original" else "full",
                "pruned_layers": list(range(round(layers.get(name, 0)))),
                "scores": dict.fromkeys(SCORES, r),
            }
            for i, r in enumerate(right)
        ]
        (folder / f"report/samples/{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        records.append(
            {
                "name": name,
                "n": len(right),
                "mean_pruned_layers": layers.get(name, 0.0),
                "nominal_speedup": 0.2,
                "measured_speedup": {"median": speedup, "low": 0.0, "high": 0.3},
                "timed": 4,
                "truncated": 1,
                "lossless": {"tokens": 1} if name in lossless else None,
            }
        )
    seed = next((int(o.partition("=")[2]) for o in overrides if o.startswith("seed=")), 0)
    config = {"seed": seed, "name": folder.name, "evaluation": {"router_seeds": list(seeds)}, "method": "x"}
    table = {"rows": records, "machine": {"cpu": "one", "cores": 2}, "config": config, "overrides": overrides, "plugins": {}}
    table["inputs"] = {"queries": "their hash"}
    if num_layers is not None:
        table["num_layers"] = num_layers
        write_queries(folder / "report", [asked(i) for i in range(len(next(iter(rows.values()))))])
    (folder / "report/table.json").write_text(json.dumps(table))
    return read_run(folder)
