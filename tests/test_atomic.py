import pytest

from dynprune.atomic import replacing


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
