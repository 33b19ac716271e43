from dataclasses import replace

import pytest

from dynprune.data.splits import SPLITS, function_groups, select, split_by_function
from dynprune.data.tasks import Query

SHARES = {"adapt": 0.4, "train": 0.2, "validation": 0.1, "test": 0.3}


def query(number: int, *functions: str, category: str = "simple") -> Query:
    return Query(
        id=f"q{number:04d}",
        category=category,
        messages=({"role": "user", "content": "?"},),
        tools=(),
        answers=tuple({"name": name, "arguments": {}} for name in functions),
        allowed=(),
    )


def chained(n: int) -> list[Query]:
    """Queries in families of up to four that share functions in a chain."""
    return [query(i, f"f{i // 4}.{i % 4}", f"f{i // 4}.{(i + 1) % 4}", category="ab"[i // 4 % 2]) for i in range(n)]


def test_no_two_splits_call_the_same_function_even_through_a_chain():
    splits = split_by_function(chained(400), SHARES, seed=0)
    called = {name: {f for q in members for f in q.functions} for name, members in splits.items()}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not called[a] & called[b]
    assert sorted(q.id for members in splits.values() for q in members) == [q.id for q in chained(400)]


def test_each_split_gets_its_share_of_each_category():
    splits = split_by_function(chained(400), SHARES, seed=0)
    for name, members in splits.items():
        for category in "ab":
            got = sum(q.category == category for q in members)
            assert got == pytest.approx(200 * SHARES[name], abs=4)


def test_the_split_depends_on_the_seed_but_not_on_the_order_of_the_queries():
    one = split_by_function(chained(400), SHARES, seed=0)
    turned = split_by_function(chained(400)[::-1], SHARES, seed=0)
    other = split_by_function(chained(400), SHARES, seed=1)
    ids = {name: {q.id for q in members} for name, members in one.items()}
    assert ids == {name: {q.id for q in members} for name, members in turned.items()}
    assert ids != {name: {q.id for q in members} for name, members in other.items()}


def test_a_share_of_zero_leaves_a_split_empty():
    shares = {"adapt": 0.0, "train": 0.5, "validation": 0.2, "test": 0.3}
    assert split_by_function(chained(40), shares, seed=0)["adapt"] == []


@pytest.mark.parametrize(
    "shares",
    [
        {"adapt": 0.5, "train": 0.5},
        {"adapt": 0.4, "train": 0.2, "validation": 0.1, "test": 0.4},
        {"adapt": -0.1, "train": 0.7, "validation": 0.1, "test": 0.3},
    ],
)
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(ValueError, match="needs one share"):
        split_by_function(chained(40), shares, seed=0)


def test_queries_that_all_call_one_function_cannot_be_split():
    with pytest.raises(ValueError, match="got no query"):
        split_by_function([query(i, "f") for i in range(20)], SHARES, seed=0)


def test_only_some_queries_of_each_split_are_kept_and_none_moves_to_another():
    splits = split_by_function(chained(400), SHARES, seed=0)
    long = replace(query(900, "g", category="a"), messages=({"role": "user", "content": "?" * 500},))
    splits["test"].append(long)
    kept = select(splits, ["a"], max_chars=300)
    assert kept == {name: [q for q in members if q.category == "a" and q is not long] for name, members in splits.items()}
    assert select(splits, None, None) == splits


def test_a_category_that_no_query_has_is_refused():
    with pytest.raises(ValueError, match=r"data\.only\.categories has 'c'.*allowed: null for all, or some of a, b"):
        select(split_by_function(chained(400), SHARES, seed=0), ["a", "c"], None)


def test_queries_that_are_connected_by_functions_have_one_label():
    calls = [("a",), ("b", "c"), ("d",), ("c", "e"), ("e",), ("a",), ("f",)]
    queries = [query(i, *names) for i, names in enumerate(calls)]
    labels = function_groups(queries)
    assert labels[0] == labels[5]
    assert labels[1] == labels[3] == labels[4]
    assert len(set(labels)) == 4
