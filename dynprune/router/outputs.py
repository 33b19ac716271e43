"""What the router says about a batch of queries.

Legend: B = batch, L = decoder layers of the SLM.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RouterOutputs:
    """The router's heads for B queries.

    Attributes:
        layer_logits_BL: Layer scores before the sigmoid; the higher, the safer the layer is to prune.
        mu_B: Mean of the Normal over the share of layers to prune, in (0, 1).
        log_sigma_B: Logarithm of its standard deviation.
    """

    layer_logits_BL: Tensor
    mu_B: Tensor
    log_sigma_B: Tensor
