import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import dynprune

ROOT = Path(dynprune.__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout"),
]


def run(*command: str | Path, cwd: Path) -> str:
    # Without PYTHONPATH, or the checkout could stand in for the wheel.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DYNPRUNE"))}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: leftovers of earlier builds in the checkout would get into the wheel.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dynprune", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel, which takes all else from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but the .pth files in it are not read: an editable install of the
    # checkout in the outer environment has no effect here.
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_the_configuration_and_the_deltas_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"dynprune/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    deltas = ROOT / "dynprune" / "slm" / "deltas"
    files = {str(path.relative_to(ROOT)) for path in deltas.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dynprune").rglob("*.py")}
    assert "dynprune/conf/config.yaml" in conf
    assert (conf | files | modules) - names == set()
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"dynprune", metadata}


def test_the_installed_command_explains_itself_from_an_empty_folder(environment, tmp_path):
    python = environment / "bin" / "python"
    found = run(python, "-c", "import dynprune; print(dynprune.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment)
    text = run(environment / "bin" / "dynprune", "--help", cwd=tmp_path)
    assert "experiment" in text
    assert "quickstart" in text
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_runs_a_pipeline_from_an_empty_folder(environment, tmp_path):
    (package,) = environment.glob("lib/python*/site-packages/dynprune")

    def files():
        return {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    before = files()
    run(environment / "bin" / "dynprune", "experiment=tiny", cwd=tmp_path)
    stages = {path.parents[1].name for path in tmp_path.rglob("manifest.json")}
    assert {"adapters", "explore", "pairs", "router", "evaluate"} <= stages
    assert files() == before
