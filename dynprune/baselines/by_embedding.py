"""Choosing one of a few sets by the query's embedding: nearest centroid, and PuDDing's regression.

Both learn from the losses of training queries under each set of a library, and both end in a linear function of the embedding
for each set or cluster, of which the smallest decides: a squared distance is one, but for what all centroids have in common.

Axis suffixes: Q = queries, E = embedding size, S = sets to choose from, C = clusters, A = arguments of the choice, K = layers
of a set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.linear_model import RidgeCV

from dynprune.atomic import replacing

Array = npt.NDArray[np.float64]

_PENALTIES = np.logspace(-4, 4, 17)


@dataclass(frozen=True)
class LinearChoice:
    """Takes the set whose linear function of the embedding is the smallest.

    Attributes:
        weight_AE: Weights.
        bias_A: What is added.
        sets_AK: The sets, as layer numbers; one may stand there more than once.
    """

    weight_AE: Array
    bias_A: Array
    sets_AK: npt.NDArray[np.int64]

    def __call__(self, embedding_E: npt.ArrayLike) -> tuple[int, ...]:
        """The set for a query."""
        best = int(np.argmin(self.weight_AE @ np.asarray(embedding_E, dtype=np.float64) + self.bias_A))
        return tuple(self.sets_AK[best].tolist())

    def save(self, target: Path) -> None:
        """Writes an ``.npz`` file."""
        with replacing(target) as path, path.open("wb") as file:
            np.savez(file, weight_AE=self.weight_AE, bias_A=self.bias_A, sets_AK=self.sets_AK)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**arrays)


def cluster(embedding_QE: Array, clusters: int, seed: int, asked_by: str) -> tuple[Array, npt.NDArray[np.int64]]:
    """Groups queries by k-means, the best of ten starts.

    Args:
        embedding_QE: The queries' embeddings.
        clusters: C, the number of clusters.
        seed: Seed of the starts.
        asked_by: The configuration key that says how many, for the error message.

    Returns:
        centroid_CE, and the cluster of each query. No cluster is without members: there are fewer if embeddings are equal.

    Raises:
        ValueError: If there are fewer queries than clusters, or no cluster.
    """
    if not 1 <= clusters <= len(embedding_QE):
        raise ValueError(
            f"{asked_by}={clusters} is impossible with {len(embedding_QE)} queries; allowed: 1 to {len(embedding_QE)}, or more "
            "with more queries (evaluation.baselines.library.max_queries)"
        )
    found = KMeans(clusters, n_init=10, random_state=seed).fit(embedding_QE)
    # Where embeddings are equal, k-means may leave clusters without members.
    used, cluster_Q = np.unique(found.labels_, return_inverse=True)
    return found.cluster_centers_[used], cluster_Q


def nearest_centroid(
    embedding_QE: Array, loss_QS: Array, sets: Sequence[Sequence[int]], clusters: int, seed: int
) -> LinearChoice:
    """Gives each cluster of queries the set of the lowest mean loss on its members; a query takes its nearest cluster's.

    The cheapest of per-query choices (IG-Pruning, Qiao et al. 2025, with masks of the library instead of trained ones).

    Args:
        embedding_QE: Embeddings of the training queries.
        loss_QS: Their losses under each set.
        sets: S sets of one size.
        clusters: C, the number of clusters.
        seed: Seed of k-means.

    Raises:
        ValueError: See `cluster`.
    """
    centroid_CE, cluster_Q = cluster(embedding_QE, clusters, seed, "evaluation.baselines.nearest_centroid.clusters")
    best_C = [int(loss_QS[cluster_Q == c].mean(axis=0).argmin()) for c in range(len(centroid_CE))]
    # ‖e − c‖² = ‖e‖² − 2 c·e + ‖c‖², and ‖e‖² is the same for all.
    return LinearChoice(-2 * centroid_CE, (centroid_CE**2).sum(axis=1), np.array([sets[best] for best in best_C]))


def loss_regression(embedding_QE: Array, loss_QS: Array, sets: Sequence[Sequence[int]]) -> LinearChoice:
    """Predicts the loss of each set from the embedding by least squares; a query takes the set of the lowest.

    PuDDing's router (Wee et al. 2025), which is trained by the squared error of the sets' log-likelihoods, on a frozen encoder.
    Ridge regression instead of a network: some hundred queries are all that the losses are known of, and the penalty is chosen
    by leave-one-out error in closed form.

    Args:
        embedding_QE: Embeddings of the training queries, at least 2.
        loss_QS: Their losses under each set.
        sets: S sets of one size.
    """
    ridge = RidgeCV(alphas=_PENALTIES).fit(embedding_QE, loss_QS)
    weight_SE = np.reshape(ridge.coef_, (len(sets), -1))
    return LinearChoice(weight_SE, np.reshape(ridge.intercept_, len(sets)), np.array(sets))
