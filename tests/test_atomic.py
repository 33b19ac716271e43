import os
from pathlib import Path

import pytest

from dynprune.atomic import Pieces, damaged, noting, remove_leftovers, replacing


def test_the_file_appears_with_what_the_block_wrote(tmp_path):
    target = tmp_path / "not" / "there" / "shard.parquet"
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.suffix == ".parquet"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_reader_sees_the_old_file_until_the_block_ends(tmp_path):
    target = tmp_path / "state.json"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("half")
        assert target.read_text() == "old"
    assert target.read_text() == "half"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "state.json"
    target.write_text("old")

    def write_half_and_fail():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half_and_fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "state.json"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_leaves_is_not_taken_for_a_file_of_that_kind(tmp_path):
    with replacing(tmp_path / "shard.parquet") as temporary:
        temporary.write_text("half")
        assert list(tmp_path.glob("*.parquet")) == []


@pytest.mark.parametrize("before_the_rename", [True, False])
def test_a_kill_around_the_rename_leaves_a_file_that_passes(tmp_path, monkeypatch, before_the_rename):
    def killed(source, target):
        if not before_the_rename:
            rename(source, target)
        raise KeyboardInterrupt

    rename = os.replace
    with noting(tmp_path):
        with replacing(tmp_path / "last.ckpt") as path:
            path.write_text("first epoch")
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "last.ckpt") as path:
            path.write_text("second epoch")
    assert (tmp_path / "last.ckpt").read_text() == ("first epoch" if before_the_rename else "second epoch")
    assert damaged(tmp_path) == []
    (tmp_path / "last.ckpt").write_text("second  poch")
    assert damaged(tmp_path) == [tmp_path / "last.ckpt"]


def test_a_file_is_noted_whichever_way_its_folder_is_named(tmp_path, monkeypatch):
    # Lightning resolves the folder of its checkpoints.
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for number, (root, written) in enumerate(
        [("real", tmp_path / "real"), ("link", tmp_path / "real"), (tmp_path / "real", Path("link"))]
    ):
        with noting(Path(root)), replacing(written / f"inner/{number}.ckpt") as path:
            path.write_bytes(b"state")
        file = Path("real/inner") / f"{number}.ckpt"
        assert damaged(Path("real")) == []
        file.write_bytes(b"stabe")
        assert damaged(Path("real")) == [file]
        file.unlink()


def test_notes_lead_to_no_file_outside_of_their_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "written.txt").write_text(f"0 ../mine.txt\n0 {tmp_path / 'mine.txt'}\n0 gone.txt\n0 .")
    assert damaged(folder) == []


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / "checkpoints/.last.ckpt.abcd1234"
    left.mkdir(parents=True)
    (left / "last.ckpt").write_text("half")
    kept = [tmp_path / name for name in ("part-00000.json", "checkpoints/last.ckpt", ".hidden.json")]
    for path in kept:
        path.write_text("whole")
    remove_leftovers(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_pieces_come_back_in_their_order_whatever_was_removed(tmp_path):
    pieces = Pieces(tmp_path, "part")
    assert list(pieces.read()) == []
    others = [tmp_path / name for name in ("other-00099.json", "part.json", "part-00099.jsonl")]
    for path in others:
        path.write_text("not of them")
    for number in range(12):
        pieces.add(str(number))
    (tmp_path / "part-00003.json").unlink()
    pieces.add("12")
    assert list(pieces.read()) == [str(number) for number in range(13) if number != 3]
    assert (tmp_path / "part-00012.json").read_text() == "12"
    pieces.remove()
    assert sorted(tmp_path.iterdir()) == sorted(others)
