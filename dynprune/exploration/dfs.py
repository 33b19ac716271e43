"""Depth-first search over configurations, after the thesis: prune one more layer while the score does not fall.

The search starts from no pruning. At a node it draws layers at random, as many as the branch factor says (8
at the root, half as many at each level below, but not fewer than 2), and tries the node with each of them
added. A child whose score is not below its parent's is a node in turn; the others are dead ends.

By default the search is strictly depth-first, as in the thesis: one child is tried, and searched to its end
before its next sibling. With 20 scenarios and an SLM that forgives everything it gets 19 layers deep.
``children_at_once`` > 1 proposes that many siblings as one batch and then searches below them, the best score
first (the first drawn where scores are equal). The budget is as exact, but more of it goes into breadth: with
all siblings in one batch the same 20 scenarios end at 6 layers (1 + 8 + 4 + 2 + 2 + 2 + 1). It pays where too
few queries are searched at once to fill the SLM's batches.

Unlike the thesis's code, the search never tries a configuration twice (there, siblings were drawn with
repetition, and {1, 2} was reached from {1} and from {2}), and the budget is exact (there, every level that
was open when it ran out tried one more).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dynprune.exploration.strategy import ROOT, Configuration, ExcludingSearch, Generate, Proposals, check_at_least, children


@dataclass(frozen=True)
class DepthFirstSearch(ExcludingSearch):
    """The thesis's depth-first search.

    Attributes:
        branch_factor: Children tried at the root.
        min_branch_factor: Children tried at a node, at least, where enough untried ones are left.
        max_scenarios: Configurations tried on a query, no pruning included.
        children_at_once: Siblings proposed as one batch.
    """

    branch_factor: int = 8
    min_branch_factor: int = 2
    max_scenarios: int = 20
    children_at_once: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One of them is too small.
        """
        check_at_least("min_branch_factor", self.min_branch_factor, 1)
        check_at_least("branch_factor", self.branch_factor, self.min_branch_factor)
        check_at_least("max_scenarios", self.max_scenarios, 1)
        check_at_least("children_at_once", self.children_at_once, 1)

    def _search_below(self, score: float, layers: Sequence[int], rng: random.Random) -> Proposals:
        return self._search_node(ROOT, score, self.branch_factor, layers, rng, {ROOT})

    def _search_node(
        self,
        node: Configuration,
        score: float,
        branch_factor: int,
        layers: Sequence[int],
        rng: random.Random,
        tried: set[Configuration],
    ) -> Proposals:
        """Search below a node, and note in `tried` what is proposed."""
        untried = [child for child in children(node, layers) if child not in tried]
        drawn = rng.sample(untried, min(branch_factor, len(untried)))
        for start in range(0, len(drawn), self.children_at_once):
            # What is tried in between, below the siblings, is larger: no child of this node is among it.
            siblings = drawn[start : start + self.children_at_once][: self.max_scenarios - len(tried)]
            if not siblings:
                return
            tried.update(siblings)
            scores = yield Generate(tuple(siblings))
            best_first = sorted(zip(scores, siblings, strict=True), key=lambda pair: pair[0], reverse=True)
            for child_score, child in best_first:
                if child_score >= score:
                    narrower = max(self.min_branch_factor, branch_factor // 2)
                    yield from self._search_node(child, child_score, narrower, layers, rng, tried)
