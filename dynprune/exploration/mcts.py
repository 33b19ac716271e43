"""Monte-Carlo tree search over configurations, guided by the dense reward and confirmed by the score.

A node is a set of pruned layers, a move prunes one layer more. Each simulation descends from no pruning by UCT (Kocsis and
Szepesvári 2006),

    child chosen = argmax  mean value + c · sqrt(ln N(node) / N(child)),

estimates some new children of the node where it ends, and goes on from the best of them in the same way, down to the largest
size: a greedy playout whose sets are nodes as well, since every set on the way is a configuration of its own. The value of each
new set is added to all nodes on the way to it.

The value of a set of k layers is 1 / (1 + exp(nats lost / k)), where nats lost is by how many nats a token the reference answer
is less likely than without pruning: between 0 and 1, ½ where nothing is lost, and alike for small sets and large ones whose
layers cost the same each. With the plain likelihood every move would lower the value, and the search stay among small sets.

A set that several orders of moves lead to is one node, whose visits and values all its parents share (a transposition table,
"UCT1" of Childs, Brodeur and Kocsis 2008); so none is estimated twice. UCT chooses among the children of a node as soon as
there are w · sqrt(N(node)) of them (progressive widening, Coulom 2007), not when all are there: these are some thirty. What is
searched to its end is left out of the choice, so a budget of all subsets estimates all of them. In the end the best few of each
size are generated.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynprune.exploration.guided import Estimates, GuidedSearch
from dynprune.exploration.strategy import ROOT, Configuration, Estimate, check_at_least, children


@dataclass(frozen=True)
class MonteCarloTreeSearch(GuidedSearch):
    """Monte-Carlo tree search by the likelihood of the reference answer.

    Attributes:
        uct_constant: c, the weight of what was visited seldom.
        widening: w, how fast the children of a node become more.
        children_at_once: Children estimated together, which share the layers below the lowest one that is pruned in one of them
            only.
    """

    uct_constant: float = 0.1
    widening: float = 0.5
    children_at_once: int = 4

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One of them is too small.
        """
        super().__post_init__()
        check_at_least("children_at_once", self.children_at_once, 1)
        check_at_least("uct_constant", self.uct_constant, 0)
        check_at_least("widening", self.widening, 0)

    def _estimate(self, nats: dict[Configuration, float], layers: Sequence[int], rng: random.Random) -> Estimates:
        tree = _Tree(self, layers)
        path = [ROOT]
        while len(nats) < self.max_estimates:
            if not tree.untried(path[-1]):
                path = tree.descend()
            if not path:
                return
            untried = tree.untried(path[-1])
            new = rng.sample(untried, min(self.children_at_once, self.max_estimates - len(nats), len(untried)))
            nats.update(zip(new, (yield Estimate(tuple(new))), strict=True))
            for child in new:
                tree.add(child, path, _value(nats[child] - nats[ROOT], len(child)))
            path.append(min(new, key=nats.__getitem__))


class _Tree:
    """Visits and values of the sets that were estimated."""

    def __init__(self, settings: MonteCarloTreeSearch, layers: Sequence[int]) -> None:
        self._settings = settings
        self._layers = layers
        self._visits: dict[Configuration, int] = {(): 1}
        self._total: dict[Configuration, float] = {(): 0.0}
        self._exhausted: set[Configuration] = set()

    def untried(self, node: Configuration) -> list[Configuration]:
        """Children that were not estimated, neither from this node nor from another."""
        if len(node) == self._settings.depth:
            return []
        return [child for child in children(node, self._layers) if child not in self._visits]

    def descend(self) -> list[Configuration]:
        """The way from no pruning to a node that gets new children; empty where nothing is left to estimate."""
        path: list[Configuration] = [()]
        while path:
            node = path[-1]
            untried = self.untried(node)
            tried = [child for child in children(node, self._layers) if child in self._visits]
            open_children = [child for child in tried if child not in self._exhausted]
            if untried and (not open_children or len(tried) < self._settings.widening * math.sqrt(self._visits[node])):
                return path
            if open_children:
                path.append(max(open_children, key=lambda child: self._uct(node, child)))
            else:
                self._exhausted.add(node)
                path.pop()
        return path

    def add(self, child: Configuration, path: Iterable[Configuration], value: float) -> None:
        """Notes a new set, and its value on the way to it."""
        self._visits[child] = 0
        self._total[child] = 0.0
        for node in (*path, child):
            self._visits[node] += 1
            self._total[node] += value

    def _uct(self, node: Configuration, child: Configuration) -> float:
        visits = self._visits[child]
        seldom = math.sqrt(math.log(self._visits[node]) / visits)
        return self._total[child] / visits + self._settings.uct_constant * seldom


def _value(nats_lost: float, size: int) -> float:
    """Worth of a set in 0..1; see the module."""
    return 1 / (1 + math.exp(min(nats_lost / size, 700.0)))
