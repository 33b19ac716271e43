"""The journal of searches in flight: what a killed exploration goes on from."""

import json
import zlib

import pytest

from dynprune.data.rollouts import Journal, Likelihood, Rollout


def test_a_journal_keeps_what_searches_in_flight_found_but_for_a_torn_line_and_what_is_complete(tmp_path):
    found = [
        Rollout("a", (1, 2), 0.5, 'says "é\u2028"\n', True),
        Likelihood("b", (), 1.25),
        Rollout("b", (), 1.0, "", False, 1.25),
    ]
    journal = Journal(tmp_path, completed_ids=())
    assert journal.found == []
    journal.append(found[:2])
    journal.append(found[2:])
    with (tmp_path / "in-flight.jsonl").open("a") as file:
        file.write('{"id": "b", "pruned_lay')
    again = Journal(tmp_path, completed_ids=())
    assert again.found == found
    again.append(found[:1])
    assert Journal(tmp_path, completed_ids=()).found == [*found, found[0]]
    assert Journal(tmp_path, completed_ids={"a"}).found == found[1:]
    assert Journal(tmp_path, completed_ids=()).found == found[1:]
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_a_journal_that_says_something_else_than_what_was_written_is_left_out(tmp_path):
    found = [Likelihood("a", (number,), float(number)) for number in range(3)]
    Journal(tmp_path, completed_ids=()).append(found)
    path = tmp_path / "in-flight.jsonl"
    text = path.read_text()
    assert text.count("1.0") == 1
    path.write_text(text.replace("1.0", "1.5"))
    assert Journal(tmp_path, completed_ids=()).found == found[:1]


def sealed(record: dict) -> bytes:
    """A line that was written as it is, by another version perhaps."""
    return json.dumps({**record, "crc32": zlib.crc32(json.dumps(record).encode())}).encode()


@pytest.mark.parametrize(
    "broken", [b"\0\0\0", b'{"id": "b"}', b"[1]", b"1", sealed({"id": "b"}), sealed({"id": "b", "pruned_layers": 1}), b"\xff"]
)
def test_a_journal_is_read_up_to_what_is_broken(tmp_path, caplog, broken):
    found = [Likelihood("a", (number,), float(number)) for number in range(3)]
    Journal(tmp_path, completed_ids=()).append(found)
    path = tmp_path / "in-flight.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, broken, b"\n", *others]))
    assert Journal(tmp_path, completed_ids=()).found == found[:1]
    assert "in-flight.jsonl is broken from line 2 on" in caplog.text
    assert path.read_bytes() == first
