import ast
import importlib
import tomllib
from pathlib import Path

import pytest

import dynprune

PACKAGE = Path(dynprune.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

ABOVE = {"methods", "exploration", "evaluation", "baselines", "app", "stages", "dynamic_model", "sweep", "tracking"}
FORBIDDEN = {
    **{part: ABOVE for part in ("data", "metrics", "slm", "adapters", "router")},
    **{part: ABOVE - {part} for part in ("methods", "exploration", "evaluation", "baselines")},
}
# These serve every part, so they may know none but each other.
SERVANTS = {"artifacts", "atomic", "manifests", "paths"}


def module_name(path: Path) -> str:
    parts = ("dynprune", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_parts(source: str, module: str, is_package: bool) -> set[str]:
    """The modules of dynprune that the source imports, anywhere in it, as 'slm.layers'."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from dynprune import slm` names the part in its aliases alone.
            names |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "dynprune" else {origin}
    return {name.removeprefix("dynprune.") for name in names if name.startswith("dynprune.")}


def violations(source: str, module: str, is_package: bool = False) -> set[str]:
    imported = imported_parts(source, module, is_package)
    part = module.split(".")[1] if "." in module else ""
    tops = {name: name.split(".")[0] for name in imported}
    wrong = {name for name, top in tops.items() if top in FORBIDDEN.get(part, ())}
    if part == "metrics":
        wrong |= {name for name, top in tops.items() if top != "metrics" and name != "data.tasks"}
    if part in SERVANTS:
        wrong |= {name for name, top in tops.items() if top not in SERVANTS}
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_in_the_direction_of_the_design(path):
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_name(path), is_package=path.name == "__init__.py") == set()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_imports(path):
    importlib.import_module(module_name(path))


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from dynprune.methods.dpo import loss", "dynprune.slm.layers", {"methods.dpo"}),
        ("import dynprune.app", "dynprune.data.bfcl", {"app"}),
        ("from dynprune import evaluation, slm", "dynprune.router.policy", {"evaluation"}),
        ("from ..exploration import dfs", "dynprune.adapters.stack", {"exploration"}),
        (
            "def f():\n    from dynprune.evaluation.table import t",
            "dynprune.methods.fbc",
            {"evaluation.table"},
        ),
        ("from dynprune.methods.losses import a", "dynprune.methods.fbc", set()),
        ("from dynprune.router.policy import a", "dynprune.methods.fbc", set()),
        ("from dynprune.exploration import dfs", "dynprune.baselines.oracle", {"exploration"}),
        ("from dynprune.data.rollouts import Rollout", "dynprune.baselines.oracle", set()),
        ("from dynprune.data.tasks import Query", "dynprune.metrics.ast_match", set()),
        ("from dynprune.data.bfcl import read", "dynprune.metrics.ast_match", {"data.bfcl"}),
        ("from dynprune.slm import loading", "dynprune.artifacts", {"slm"}),
        ("from .methods import fbc\nimport torch", "dynprune.app", set()),
    ],
)
def test_the_check_of_directions_sees_each_way_to_import(source, module, wrong):
    assert violations(source, module) == wrong


def test_the_wheel_gets_every_package():
    pyproject = PACKAGE.parent / "pyproject.toml"
    listed = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    assert set(listed) == packages | {"dynprune.conf"}
