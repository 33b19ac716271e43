"""What the router says about a batch of queries.

Legend: B = batch, L = decoder layers of the SLM.
"""

from dataclasses import dataclass

from torch import Tensor

from dynprune.router.ratio import Ratio


@dataclass(frozen=True)
class RouterOutputs:
    """The router's heads for B queries.

    Attributes:
        layer_logits_BL: Layer scores before the sigmoid; the higher, the safer the layer is to prune.
        ratio: The distribution over how many layers to prune.
    """

    layer_logits_BL: Tensor
    ratio: Ratio
