"""The store's list and its cleaning, on artifacts that the store itself made."""

import threading

import pytest
from filelock import FileLock
from tiny import composed

from dynprune import inventory
from dynprune.artifacts import Store, fingerprint, read_uses
from dynprune.inventory import distinguishing, remove, stored
from dynprune.stages import store as store_stage
from dynprune.stages.run import Run


def make(root, stage, config, upstream=None, run=None):
    """An artifact of six bytes and a manifest."""
    store = Store(root, uses=None if run is None else root.parent / run / "artifacts.txt")

    def build(folder):
        (folder / "data.txt").write_text("sixsix")
        return {}

    return store.get_or_build(stage, 1, config, {}, upstream or {}, build, resumable=False)


@pytest.fixture
def root(tmp_path):
    """A run that uses one chain of artifacts; another chain that no run uses; and one that was not finished."""
    root = tmp_path / "artifacts"
    explored = make(root, "explore", {"strategy": {"name": "dfs"}, "seed": 0})
    make(root, "router", {"method": {"name": "dpo"}, "seed": 0}, {"source": explored.fingerprint}, run="multiruns/a/0_job")
    unused = make(root, "explore", {"strategy": {"name": "random"}, "seed": 0})
    make(root, "router", {"method": {"name": "fbc"}, "seed": 1}, {"source": unused.fingerprint})

    def fail(folder):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Store(root).get_or_build("static", 1, {"largest": 3}, {}, {}, fail, resumable=True)
    return root


def named(root):
    return {artifact.name: artifact for artifact in stored(root, root.parent)}


def test_what_a_run_uses_is_found_through_all_that_it_was_made_from(root):
    users = {(a.stage, a.config.get("strategy.name") or a.config.get("method.name")): a.runs for a in stored(root, root.parent)}
    assert users == {
        ("explore", "dfs"): ("multiruns/a/0_job",),
        ("explore", "random"): (),
        ("router", "dpo"): ("multiruns/a/0_job",),
        ("router", "fbc"): (),
        ("static", None): (),
    }


def test_sizes_and_states_are_those_of_the_files(root):
    for artifact in stored(root, root.parent):
        files = [path for path in artifact.folder.rglob("*") if path.is_file()]
        assert artifact.num_bytes == sum(len(path.read_bytes()) for path in files)
        assert artifact.complete == (artifact.stage != "static") == (artifact.seconds is not None)


def test_the_settings_shown_are_those_in_which_artifacts_of_a_stage_differ(root):
    told = {
        a.stage + str(a.config.get("seed", "")): distinguishing(stored(root, root.parent))[a.name]
        for a in stored(root, root.parent)
        if a.stage != "explore"
    }
    # What it is called first; what is the same for all is left out.
    assert list(told["router0"].items()) == [("method.name", "dpo"), ("seed", 0)]
    assert told["static"] == {}


def test_a_use_is_noted_once_and_before_the_artifact_is_there(tmp_path):
    store = Store(tmp_path / "artifacts", uses=tmp_path / "run/artifacts.txt")
    seen = []

    def build(folder):
        seen.append(read_uses(tmp_path / "run/artifacts.txt"))
        return {}

    for _ in range(2):
        store.get_or_build("pairs", 1, {}, {}, {}, build, resumable=False)
    name = f"pairs/{fingerprint('pairs', 1, {}, {}, {})}"
    assert seen == [[name]]
    assert read_uses(tmp_path / "run/artifacts.txt") == [name]


def test_what_is_being_built_is_not_removed(root):
    [artifact] = [a for a in stored(root, root.parent) if a.stage == "static"]
    place = artifact.folder.with_name(artifact.folder.name.removesuffix(".partial"))
    held, done = threading.Event(), threading.Event()

    def hold():
        with FileLock(place.with_name(f"{place.name}.lock")):
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    assert not remove(artifact)
    assert artifact.folder.is_dir()
    done.set()
    thread.join()
    assert remove(artifact)
    assert not artifact.folder.exists()


def run_of(root):
    return Run(composed("experiment=tiny", f"paths.outputs={root.parent}", f"paths.artifacts={root}", "paths.run=somewhere"))


@pytest.mark.parametrize(("answer", "left"), [("y", 2), ("n", 5)])
def test_cleaning_asks_and_leaves_what_is_used(root, monkeypatch, capsys, answer, left):
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    store_stage.clean(run_of(root))
    assert len(named(root)) == left
    assert {"explore", "router"} <= {artifact.stage for artifact in named(root).values() if artifact.runs}
    assert not list(root.glob("*/.*"))
    said = capsys.readouterr().out
    assert "Remove 3 artifacts" in said


def test_cleaning_without_anybody_to_ask_removes_nothing(root, monkeypatch):
    def nobody(*_):
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    store_stage.clean(run_of(root))
    assert len(named(root)) == 5


def test_a_clean_store_needs_no_question(root, monkeypatch, caplog):
    for artifact in stored(root, root.parent):
        if not artifact.runs:
            inventory.remove(artifact)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with caplog.at_level("INFO"):
        store_stage.clean(run_of(root))
    assert "nothing to remove" in caplog.text


def test_the_list_shows_every_artifact(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    store_stage.list_artifacts(run_of(root))
    said = capsys.readouterr().out
    assert all(name in said for name in named(root))
    assert "unfinished" in said
    total = sum(artifact.num_bytes for artifact in named(root).values())
    assert f"{total / 1024:.1f} KiB" in said


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (3 * 86400, "3 d")]
)
def test_durations_are_in_their_largest_unit(seconds, shown):
    assert store_stage._duration(seconds) == shown


def test_a_run_anywhere_uses_what_it_asked_for(tmp_path):
    store = Store(tmp_path / "artifacts", uses=tmp_path / "elsewhere/run/artifacts.txt")
    store.get_or_build("pairs", 1, {}, {}, {}, lambda folder: {}, resumable=False)
    [artifact] = stored(tmp_path / "artifacts", tmp_path / "outputs")
    assert artifact.runs == ("../elsewhere/run",)


def test_what_a_run_begins_to_use_while_it_is_asked_stays(root, monkeypatch):
    [wanted] = [a for a in stored(root, root.parent) if a.stage == "explore" and not a.runs]

    def answer(*_):
        path = root.parent / "late/artifacts.txt"
        path.parent.mkdir()
        path.write_text(f"{wanted.name}\n")
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    store_stage.clean(run_of(root))
    assert wanted.folder.is_dir()
    assert len(named(root)) == 3


def test_a_broken_manifest_is_named_with_what_to_do(root):
    [artifact] = [a for a in stored(root, root.parent) if a.stage == "static"]
    (artifact.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not JSON .*: delete it"):
        stored(root, root.parent)
