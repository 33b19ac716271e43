"""The router: a sentence encoder and two heads, as in the thesis.

    layer_logits = layers_score(relu(layers_hidden(e)))
    mu           = sigmoid(ratio_mu(h)),  h = relu(ratio_hidden(e))
    log sigma    = min + (max − min)·(tanh(ratio_log_std(h)) + 1) / 2

Legend: B = batch, E = embedding size, L = decoder layers of the SLM, H = hidden size of the heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynprune.router.encoder import TextEncoder
from dynprune.router.outputs import RouterOutputs


class Router(nn.Module):
    """Says for each query how safe each layer is to prune, and how large a share to prune.

    The heads read embeddings, so that with a frozen encoder each query is embedded once and never again.

    Attributes:
        encoder: The sentence encoder.
        num_layers: L.
        head_hidden_dim: H.
        log_std_min: Lower bound of log sigma.
        log_std_max: Upper bound of log sigma.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        num_layers: int,
        head_hidden_dim: int = 128,
        log_std_min: float = -7.0,
        log_std_max: float = -3.0,
    ) -> None:
        """Builds the heads, with torch's default initialisation.

        Args:
            encoder: The sentence encoder.
            num_layers: L, the number of decoder layers of the SLM.
            head_hidden_dim: H, the hidden size of each head.
            log_std_min: Lower bound of log sigma, in log ratio.
            log_std_max: Upper bound of log sigma, in log ratio.

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
        self.layers_hidden = nn.Linear(encoder.size, head_hidden_dim)
        self.layers_score = nn.Linear(head_hidden_dim, num_layers)
        self.ratio_hidden = nn.Linear(encoder.size, head_hidden_dim)
        self.ratio_mu = nn.Linear(head_hidden_dim, 1)
        self.ratio_log_std = nn.Linear(head_hidden_dim, 1)

    def encode(self, features: Mapping[str, Tensor]) -> Tensor:
        """Embeds tokenised queries.

        Args:
            features: What `TextEncoder.tokenize` returned, on the router's device.

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
            spread_B = (self.ratio_log_std(ratio_hidden_BH)[:, 0].tanh() + 1) / 2
            return RouterOutputs(
                layer_logits_BL=self.layers_score(hidden_BH),
                mu_B=self.ratio_mu(ratio_hidden_BH)[:, 0].sigmoid(),
                log_sigma_B=self.log_std_min + (self.log_std_max - self.log_std_min) * spread_B,
            )
