"""The router: a sentence encoder and two heads, as in the thesis.

    layer_logits = layers_score(relu(layers_hidden(e)))
    mu           = sigmoid(ratio_mu(h)),  h = relu(ratio_hidden(e))
    log sigma    = min + (max − min)·(tanh(ratio_log_std(h)) + 1) / 2

With a categorical ratio, ratio_counts(h) are logits over k = 0..k_max in place of mu and log sigma.

Legend: B = batch, E = embedding size, L = decoder layers of the SLM, H = hidden size of the heads, K = k_max + 1 counts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynprune.router.encoder import Encoder
from dynprune.router.outputs import RouterOutputs
from dynprune.router.ratio import CategoricalRatio, NormalRatio, Ratio


class Router(nn.Module):
    """Says for each query how safe each layer is to prune, and how many layers to prune.

    The heads read embeddings, so that with a frozen encoder each query is embedded once and never again.

    Attributes:
        encoder: What embeds the queries.
        num_layers: L.
        head_hidden_dim: H.
        log_std_min: Lower bound of log sigma.
        log_std_max: Upper bound of log sigma.
        num_counts: K of a categorical ratio, or None for the Normal.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_layers: int,
        head_hidden_dim: int = 128,
        log_std_min: float = -7.0,
        log_std_max: float = -3.0,
        num_counts: int | None = None,
    ) -> None:
        """Builds the heads, with torch's default initialisation.

        Args:
            encoder: What embeds the queries.
            num_layers: L, the number of decoder layers of the SLM.
            head_hidden_dim: H, the hidden size of each head.
            log_std_min: Lower bound of log sigma, in log ratio.
            log_std_max: Upper bound of log sigma, in log ratio.
            num_counts: K, the policy's k_max + 1, for a categorical ratio; None for the Normal.

        Raises:
            ValueError: If the lower bound is not below the upper bound.
        """
        super().__init__()
        if log_std_min >= log_std_max:
            raise ValueError(
                f"router.log_std_min={log_std_min} is not below router.log_std_max={log_std_max}; "
                f"allowed: a smaller one, for example router.log_std_min=-7 router.log_std_max=-3"
            )
        self.encoder = encoder
        self.num_layers = num_layers
        self.head_hidden_dim = head_hidden_dim
        self.log_std_min = log_std_min
        self.log_std_max = log_std_max
        self.num_counts = num_counts
        self.layers_hidden = nn.Linear(encoder.size, head_hidden_dim)
        self.layers_score = nn.Linear(head_hidden_dim, num_layers)
        self.ratio_hidden = nn.Linear(encoder.size, head_hidden_dim)
        if num_counts is None:
            self.ratio_mu = nn.Linear(head_hidden_dim, 1)
            self.ratio_log_std = nn.Linear(head_hidden_dim, 1)
        else:
            self.ratio_counts = nn.Linear(head_hidden_dim, num_counts)

    def encode(self, features: Mapping[str, Tensor]) -> Tensor:
        """Embeds tokenised queries.

        Args:
            features: What `Encoder.tokenize` returned, on the router's device.

        Returns:
            embedding_BE.
        """
        return self.encoder(**features)

    def forward(self, embedding_BE: Tensor) -> RouterOutputs:
        """Applies the heads, in their own precision even under autocast.

        Args:
            embedding_BE: Embeddings of B queries, from `encode`.
        """
        # With log sigma near −7 a bucket is 40 sigma wide: three digits of bfloat16 would not tell the
        # buckets apart.
        with torch.autocast(embedding_BE.device.type, enabled=False):
            embedding_BE = embedding_BE.to(self.layers_hidden.weight.dtype)
            hidden_BH = self.layers_hidden(embedding_BE).relu()
            ratio_hidden_BH = self.ratio_hidden(embedding_BE).relu()
            return RouterOutputs(self.layers_score(hidden_BH), self._ratio(ratio_hidden_BH))

    def _ratio(self, hidden_BH: Tensor) -> Ratio:
        if self.num_counts is not None:
            return CategoricalRatio(self.ratio_counts(hidden_BH))
        spread_B = (self.ratio_log_std(hidden_BH)[:, 0].tanh() + 1) / 2
        return NormalRatio(
            mu_B=self.ratio_mu(hidden_BH)[:, 0].sigmoid(),
            log_sigma_B=self.log_std_min + (self.log_std_max - self.log_std_min) * spread_B,
        )
