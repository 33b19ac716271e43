import hashlib
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path
from threading import BrokenBarrierError

import pytest
from artifact_inputs import INPUTS

from dynprune.artifacts import Store, fingerprint
from dynprune.atomic import replacing
from dynprune.manifests import check_content, read_manifest, write_manifest

SPAWN = multiprocessing.get_context("spawn")


def write_answer(folder: Path) -> dict[str, int]:
    (folder / "answer.txt").write_text("42")
    return {"answers": 1}


def must_not_build(folder: Path) -> dict[str, int]:
    raise AssertionError("built again")


def get(root: Path, build=write_answer, resumable=True, rank=0, **changed):
    distributed = changed.pop("distributed", False)
    return Store(root, rank).get_or_build(**(INPUTS | changed), build=build, resumable=resumable, distributed=distributed)


# Building and reusing


def test_a_new_artifact_has_its_files_and_a_manifest_that_says_what_made_it(tmp_path):
    artifact = get(tmp_path)
    assert artifact.folder == tmp_path / "explore" / fingerprint(**INPUTS)
    assert (artifact.folder / "answer.txt").read_text() == "42"
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    assert manifest == artifact.manifest
    assert {key: manifest[key] for key in INPUTS} == INPUTS
    assert manifest["counts"] == {"answers": 1}
    assert manifest["versions"]["torch"]
    assert manifest["peak_memory_mib"]["process"] > 10
    assert [path.name for path in artifact.folder.parent.iterdir() if path.is_dir()] == [artifact.fingerprint]


def test_the_same_inputs_reuse_the_artifact_and_the_log_says_so(tmp_path, caplog):
    first = get(tmp_path)
    with caplog.at_level(logging.INFO, "dynprune.artifacts"):
        again = get(tmp_path, must_not_build, config={"limit": 20, "strategy": "dfs"})
    assert again == first
    assert f"reusing explore {first.fingerprint} (from {first.manifest['created']}, took" in caplog.text


def complete(root: Path) -> set[Path]:
    return {path.parent for path in root.glob("*/*/manifest.json") if path.parent.suffix != ".partial"}


def test_other_inputs_make_another_artifact_beside_the_first(tmp_path):
    artifacts = [get(tmp_path), get(tmp_path, stage="adapters"), get(tmp_path, config={"limit": 21})]
    assert complete(tmp_path) == {artifact.folder for artifact in artifacts}
    assert len(complete(tmp_path)) == 3


def test_counts_that_json_cannot_hold_are_refused_before_the_artifact_gets_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"counts\.rollouts"):
        get(tmp_path, lambda folder: {"rollouts": {1, 2}})
    assert complete(tmp_path) == set()


# Stopping and going on


def write_half_and_raise(error):
    def build(folder: Path) -> dict[str, int]:
        (folder / "half.txt").write_text("half")
        raise error

    return build


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_a_build_that_stops_keeps_what_it_wrote_and_the_next_one_goes_on(tmp_path, caplog, error):
    with pytest.raises(type(error)), caplog.at_level(logging.INFO, "dynprune.artifacts"):
        get(tmp_path, write_half_and_raise(error))
    partial = tmp_path / "explore" / f"{fingerprint(**INPUTS)}.partial"
    assert f"kept in {partial}, and the same command goes on from there" in caplog.text
    assert complete(tmp_path) == set()

    seen = []

    def finish(folder: Path) -> dict[str, int]:
        seen.append((folder / "half.txt").read_text())
        return write_answer(folder)

    artifact = get(tmp_path, finish)
    assert seen == ["half"]
    assert {path.name for path in artifact.folder.iterdir()} == {"manifest.json", "half.txt", "answer.txt"}
    attempts = artifact.manifest["attempts"]
    assert len(attempts) == 2
    assert artifact.manifest["wall_clock_s"] == sum(attempt["seconds"] for attempt in attempts)
    assert not partial.exists()


def test_a_stage_that_cannot_resume_starts_in_an_empty_folder(tmp_path, caplog):
    with pytest.raises(OSError, match="disk full"):
        get(tmp_path, write_half_and_raise(OSError("disk full")), resumable=False)
    assert "goes on from the stages before it" in caplog.text
    artifact = get(tmp_path, resumable=False)
    assert {path.name for path in artifact.folder.iterdir()} == {"manifest.json", "answer.txt"}
    assert len(artifact.manifest["attempts"]) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_damaged_since_the_earlier_attempt_is_made_anew_and_the_rest_is_kept(tmp_path, caplog):
    present = []

    def build(folder: Path) -> dict[str, int]:
        present.append(sorted(path.name for path in folder.glob("*.json") if path.name != "manifest.json"))
        for name in ("a.json", "b.json", "c.json"):
            if not (folder / name).exists():
                with replacing(folder / name) as path:
                    path.write_text(f"[1, 2, {len(present)}]")
        if len(present) == 1:
            with replacing(folder / "log.json", appended=True) as path:
                path.write_text("[]")
            (folder / "log.json").write_text("[] []")
            # What is written a second time is as it was written last.
            with replacing(folder / "c.json") as path:
                path.write_text("[4, 5, 6]")
            raise OSError("disk full")
        return {}

    with pytest.raises(OSError, match="disk full"):
        get(tmp_path, build)
    partial = tmp_path / "explore" / f"{fingerprint(**INPUTS)}.partial"
    like = INPUTS | {"config": {"strategy": "dfs", "limit": 30}}
    assert list(Store(tmp_path).differing_in("limit", **like)) == [partial]
    flip(partial / "b.json")
    # A kill tears a line.
    with (partial / "written.txt").open("a") as file:
        file.write("\n0123")
    assert list(Store(tmp_path).differing_in("limit", **like)) == []
    artifact = get(tmp_path, build)
    assert present == [[], ["a.json", "c.json", "log.json"]]
    assert f"{partial / 'b.json'} is not what was written; it is removed, and made anew" in caplog.text
    found = {path.name: path.read_text() for path in artifact.folder.iterdir() if path.name != "manifest.json"}
    assert found == {"a.json": "[1, 2, 1]", "b.json": "[1, 2, 2]", "c.json": "[4, 5, 6]", "log.json": "[] []"}
    assert set(artifact.manifest["files"]) == set(found)


def test_what_is_damaged_after_a_kill_just_before_a_folder_gets_its_name_is_made_anew(tmp_path, monkeypatch):
    def build(folder: Path) -> dict[str, int]:
        if not (folder / "a.json").exists():
            with replacing(folder / "a.json") as path:
                path.write_text("[1]")
        return {}

    def killed(*arguments: Path) -> None:
        raise KeyboardInterrupt

    # From the end of the build on, up to the name.
    for name in ("content_hashes", "versions", "flush"):
        root = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(f"dynprune.artifacts.{name}", killed)
            with pytest.raises(KeyboardInterrupt):
                get(root, build)
        flip(root / "explore" / f"{fingerprint(**INPUTS)}.partial/a.json")
        artifact = get(root, build)
        assert (artifact.folder / "a.json").read_text() == "[1]"
        assert sorted(path.name for path in artifact.folder.iterdir()) == ["a.json", "manifest.json"]
        assert set(artifact.manifest["files"]) == {"a.json"}


def write_half_and_hang(root: Path, written) -> None:
    def build(folder: Path) -> dict[str, int]:
        (folder / "half.txt").write_text("half")
        written.set()
        time.sleep(600)
        return {}

    get(root, build)


def test_a_killed_build_is_never_read_and_its_time_counts_when_another_process_goes_on(tmp_path):
    written = SPAWN.Event()
    process = SPAWN.Process(target=write_half_and_hang, args=(tmp_path, written))
    process.start()
    assert written.wait(60)
    process.kill()
    process.join()
    assert complete(tmp_path) == set()

    half = tmp_path / "explore" / f"{fingerprint(**INPUTS)}.partial" / "half.txt"
    began = json.loads((half.parent / "manifest.json").read_text())["attempts"][0]["started"]
    os.utime(half, (began + 100, began + 100))

    artifact = get(tmp_path)
    assert (artifact.folder / "half.txt").read_text() == "half"
    assert artifact.manifest["attempts"][0]["seconds"] == pytest.approx(100, abs=0.01)
    assert 100 <= artifact.manifest["wall_clock_s"] < 110


# Several processes


def build_slowly_once(root: Path, tries, started) -> None:
    logging.basicConfig(filename=root / f"{os.getpid()}.log", level=logging.INFO)

    def build(folder: Path) -> dict[str, int]:
        tries.put(os.getpid())
        started.set()
        # Long enough for the other process to come to the lock, which the log shows below.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any("waiting" in log.read_text() for log in root.glob("*.log")):
                break
            time.sleep(0.02)
        return write_answer(folder)

    get(root, build)


def test_two_processes_that_want_the_same_artifact_build_it_once(tmp_path):
    tries, started = SPAWN.Queue(), SPAWN.Event()
    processes = [SPAWN.Process(target=build_slowly_once, args=(tmp_path, tries, started)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    builder = tries.get(timeout=5)
    assert tries.empty()
    (waiter,) = {process.pid for process in processes} - {builder}
    text = (tmp_path / f"{waiter}.log").read_text()
    assert text.index("waiting for explore") < text.index("reusing explore")


def meet_and_build(root: Path, rank: int, barrier, failing: bool) -> None:
    def build(folder: Path) -> dict[str, int]:
        try:
            barrier.wait(30)
        except BrokenBarrierError:
            os._exit(3)
        if failing and rank == 0:
            raise OSError("disk full")
        return write_answer(folder) if rank == 0 else {}

    try:
        artifact = get(root, build, rank=rank, distributed=True)
    except RuntimeError as error:
        os._exit(4 if "rank 0 did not finish explore" in str(error) else 5)
    assert (artifact.folder / "answer.txt").read_text() == "42"


@pytest.mark.parametrize(("failing", "exitcodes"), [(False, [0, 0]), (True, [1, 4])])
def test_the_ranks_of_a_distributed_build_meet_inside_it(tmp_path, failing, exitcodes):
    barrier = SPAWN.Barrier(2)
    processes = [SPAWN.Process(target=meet_and_build, args=(tmp_path, rank, barrier, failing)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == exitcodes


# Broken artifacts


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[]", "is not a JSON object"),
        (lambda text: "{}", "lacks stage, fingerprint"),
        (lambda text: text.replace('"limit": 20', '"limit": 21'), "is not what was written"),
        (lambda text: text.replace('"answers": 1', '"answers": 3'), "is not what was written"),
    ],
)
def test_a_broken_manifest_is_an_error_that_names_the_file_and_the_remedy(tmp_path, damage, why):
    artifact = get(tmp_path)
    path = artifact.folder / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=why) as error:
        get(tmp_path, must_not_build)
    assert str(path) in str(error.value)
    assert f"rm -r {artifact.folder}" in str(error.value)


@pytest.mark.parametrize("changed", [{"config": {"limit": 21}}, {"stage": "pairs"}])
def test_the_manifest_of_another_artifact_is_an_error(tmp_path, changed):
    artifact = get(tmp_path)
    write_manifest(artifact.folder, {**artifact.manifest, **changed})
    with pytest.raises(ValueError, match="is of another artifact, or was edited"):
        get(tmp_path, must_not_build)


def test_whichever_bit_of_a_manifest_is_flipped_what_it_says_is_refused_or_the_same(tmp_path):
    artifact = get(tmp_path)
    path = artifact.folder / "manifest.json"
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            said = read_manifest(path, ())
        except ValueError:
            refused += 1
            continue
        # A space between two words, or the name of the hash: nothing that it says.
        assert artifact.manifest.items() <= said.items()
    assert refused > len(whole) / 5


def test_a_folder_that_lost_its_manifest_is_an_error(tmp_path):
    artifact = get(tmp_path)
    (artifact.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        get(tmp_path, must_not_build)


# What is there


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "longer"])
def test_a_file_that_is_not_what_was_written_is_an_error_that_names_it_and_the_remedy(tmp_path, damage):
    artifact = get(tmp_path)
    file = artifact.folder / "answer.txt"
    assert artifact.manifest["files"] == {"answer.txt": hashlib.sha256(b"42").hexdigest()}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flipped": b"43", "cut": b"4", "longer": b"42\n"}[damage])
    check_content.cache_clear()
    with pytest.raises(ValueError, match=rf"answer.txt is .*rm -r {artifact.folder}\)"):
        get(tmp_path, build=must_not_build)


def test_what_was_made_before_there_were_hashes_is_read(tmp_path):
    path = get(tmp_path).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"], manifest["sha256"]
    path.write_text(json.dumps(manifest))
    (path.parent / "answer.txt").write_text("43")
    assert get(tmp_path, build=must_not_build).manifest == manifest


def test_only_a_complete_artifact_is_held_and_folders_of_like_ones_are_found(tmp_path):
    store = Store(tmp_path)
    name = fingerprint(**INPUTS)
    assert not store.holds(**INPUTS)
    with pytest.raises(AssertionError):
        get(tmp_path, must_not_build)
    assert not store.holds(**INPUTS)
    partial = tmp_path / "explore" / f"{name}.partial"
    other = INPUTS | {"config": {"strategy": "dfs", "limit": 30}}
    assert list(store.differing_in("limit", **other)) == [partial]

    complete = get(tmp_path).folder
    assert store.holds(**INPUTS)
    assert store.find(**INPUTS).folder == complete
    assert store.find(**(INPUTS | {"stage": "pairs"})) is None
    assert not store.holds(**(INPUTS | {"stage": "pairs"}))
    assert list(store.differing_in("limit", **other)) == [complete]
    assert list(store.differing_in("limit", **INPUTS)) == [complete]
    assert list(store.differing_in("strategy", **other)) == []
    for changed in ({"version": 2}, {"data": {"name": "xlam"}}, {"upstream": {}}):
        assert list(store.differing_in("limit", **(other | changed))) == []
        assert not store.holds(**(INPUTS | changed))


def test_code_that_is_not_this_packages_belongs_to_every_artifact(tmp_path):
    plain = get(tmp_path)
    for plugins in ({"mine": "one"}, {"mine": "two"}):
        store = Store(tmp_path, plugins=plugins)
        assert not store.holds(**INPUTS)
        assert store.find(**INPUTS) is None
        made = store.get_or_build(**INPUTS, build=lambda folder: {}, resumable=False)
        assert made.fingerprint != plain.fingerprint
        assert made.manifest["config"]["plugins"] == plugins
        assert store.find(**INPUTS).folder == made.folder
        assert list(store.differing_in("limit", **INPUTS)) == [made.folder]
    assert list(Store(tmp_path).differing_in("limit", **INPUTS)) == [plain.folder]
