"""Splits by function name: no test query calls a function that another split calls.

Queries that call a common function belong to one component; a component goes to one split as a whole. Components are dealt
out greedily, largest first, to the split that misses most of what the component holds, category by category, so that each
split has about the same mix of categories.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dynprune.data.tasks import Query

SPLITS = ("adapt", "train", "validation", "test")


def split_by_function(queries: Sequence[Query], shares: Mapping[str, float], seed: int) -> dict[str, list[Query]]:
    """Deals queries out to splits so that no two splits call the same function.

    Args:
        queries: All queries; their order does not matter.
        shares: Share of the queries that each split should get, in 0..1; the shares sum to 1.
        seed: Seed of the order in which components of equal size are dealt out.

    Returns:
        The queries of each split, sorted as they came.

    Raises:
        ValueError: If the shares name an unknown split, are negative or do not sum to 1, an id comes twice, or a split
            stays empty.
    """
    if set(shares) != set(SPLITS) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(
            f"data.splits is {dict(shares)}, but it needs one share of at least 0 for each of {', '.join(SPLITS)}, "
            "summing to 1; for example data.splits.test=0.3 data.splits.adapt=0.45"
        )
    twice = [name for name, count in Counter(query.id for query in queries).items() if count > 1]
    if twice:
        raise ValueError(f"the data has the id {twice[0]!r} more than once; give each query an id of its own")
    ordered = sorted(range(len(queries)), key=lambda index: queries[index].id)
    components = _components([queries[index] for index in ordered])
    random.Random(seed).shuffle(components)
    components.sort(key=len, reverse=True)

    totals = Counter(query.category for query in queries)
    need = {(split, category): shares[split] * n for split in SPLITS for category, n in totals.items()}
    members: dict[str, list[int]] = {split: [] for split in SPLITS}
    for component in components:
        mix = Counter(queries[ordered[position]].category for position in component)

        def missing(split: str, mix: Counter[str] = mix) -> float:
            return sum(n * need[split, category] / totals[category] for category, n in mix.items())

        chosen = max((split for split in SPLITS if shares[split] > 0), key=missing)
        members[chosen] += [ordered[position] for position in component]
        for category, n in mix.items():
            need[chosen, category] -= n
    empty = [split for split in SPLITS if shares[split] > 0 and not members[split]]
    if empty:
        raise ValueError(
            f"the splits {', '.join(empty)} got no query: the {len(queries)} queries call only {len(components)} "
            "unconnected groups of functions; give more queries or set data.splits of these splits to 0"
        )
    return {split: [queries[index] for index in sorted(indices)] for split, indices in members.items()}


def function_groups(queries: Sequence[Query]) -> list[int]:
    """Labels queries such that those that are connected through the functions they call have the same label.

    Args:
        queries: The queries.

    Returns:
        A label for each.
    """
    label_of = {position: label for label, members in enumerate(_components(queries)) for position in members}
    return [label_of[position] for position in range(len(queries))]


def select(
    splits: Mapping[str, Sequence[Query]], categories: Sequence[str] | None, max_chars: int | None
) -> dict[str, list[Query]]:
    """Leaves out of each split what is of another category or too long.

    Args:
        splits: The queries of each split.
        categories: Categories to keep; ``None`` keeps all.
        max_chars: Most characters of a query's messages and tools together; ``None`` keeps all.

    Returns:
        The queries of each split that are kept, in their order.

    Raises:
        ValueError: If the categories are no list, or no query has one of them.
    """
    if isinstance(categories, str):
        raise ValueError(f"data.only.categories={categories} is no list; type data.only.categories=[{categories}]")
    known = {query.category for members in splits.values() for query in members}
    unknown = sorted(set(categories or ()) - known)
    if unknown:
        raise ValueError(
            f"data.only.categories has {unknown[0]!r}, which no query has; allowed: null for all, or some of "
            f"{', '.join(sorted(known))}"
        )

    def kept(query: Query) -> bool:
        return (categories is None or query.category in categories) and (max_chars is None or query.num_chars <= max_chars)

    return {name: [query for query in members if kept(query)] for name, members in splits.items()}


def _components(queries: Sequence[Query]) -> list[list[int]]:
    """Groups positions of queries that are connected through the functions they call."""
    names: dict[str, int] = {}
    rows, columns = [], []
    for position, query in enumerate(queries):
        for name in sorted(query.functions):
            rows.append(position)
            columns.append(len(queries) + names.setdefault(name, len(names)))
    size = len(queries) + len(names)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels[: len(queries)]):
        groups.setdefault(int(label), []).append(position)
    return list(groups.values())
