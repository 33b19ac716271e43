import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dynprune.paths
from dynprune.paths import conf_dir

SOURCE = Path(dynprune.paths.__file__)


def lay_out(package: Path, *conf_folders: Path) -> None:
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(SOURCE, package / "paths.py")
    for folder in conf_folders:
        folder.mkdir()
        (folder / "config.yaml").touch()


def found_by(package: Path) -> Path:
    code = "from dynprune.paths import conf_dir; print(conf_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, env={}, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def test_an_installed_package_uses_the_conf_inside_it_before_the_one_beside_it(tmp_path):
    package = tmp_path / "dynprune"
    lay_out(package, package / "conf", tmp_path / "conf")
    assert found_by(package) == package / "conf"


def test_a_checkout_uses_the_conf_beside_the_package(tmp_path):
    package = tmp_path / "dynprune"
    lay_out(package, tmp_path / "conf")
    assert found_by(package) == tmp_path / "conf"


def test_the_environment_variable_comes_first_and_may_be_relative(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNPRUNE_CONF", "mine")
    assert conf_dir() == tmp_path / "mine"


def test_a_wrong_environment_variable_is_an_error_that_names_all_three_places(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNPRUNE_CONF", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as error:
        conf_dir()
    for place in (tmp_path / "nowhere", SOURCE.parent / "conf", SOURCE.parent.parent / "conf"):
        assert str(place) in str(error.value)
