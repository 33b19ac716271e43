"""The adapters of all layers, stacked: h + W_up relu(W_down h + b_down) + b_up, one for each decoder layer.

Shapes: L = layers, B = batch, T = tokens, d = hidden size, b = bottleneck.
"""

import torch
from torch import Tensor, nn


class AdapterStack(nn.Module):
    """One bottleneck adapter for each layer, their weights stacked so that all of them train in one computation.

    The output projection starts at zero, so an untrained adapter is the identity.

    Attributes:
        down_Lbd: W_down of each layer.
        down_bias_Lb: b_down of each layer.
        up_Ldb: W_up of each layer.
        up_bias_Ld: b_up of each layer.
    """

    def __init__(self, num_layers: int, hidden_size: int, bottleneck: int) -> None:
        """Makes untrained adapters.

        Args:
            num_layers: L.
            hidden_size: d.
            bottleneck: b, the width between the two projections.

        Raises:
            ValueError: If the bottleneck is below 1.
        """
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"adapter.bottleneck={bottleneck} must be at least 1; for example adapter.bottleneck=64")
        self.down_Lbd = nn.Parameter(torch.empty(num_layers, bottleneck, hidden_size))
        self.down_bias_Lb = nn.Parameter(torch.zeros(num_layers, bottleneck))
        self.up_Ldb = nn.Parameter(torch.zeros(num_layers, hidden_size, bottleneck))
        self.up_bias_Ld = nn.Parameter(torch.zeros(num_layers, hidden_size))
        nn.init.normal_(self.down_Lbd, std=hidden_size**-0.5)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.down_Lbd.shape[0]

    @property
    def bottleneck(self) -> int:
        """Width between the two projections."""
        return self.down_Lbd.shape[1]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.down_Lbd.shape[2]

    def layer(self, index: int, hidden_BTd: Tensor) -> Tensor:
        """What the adapter of one layer puts in the layer's place.

        Args:
            index: Number of the layer.
            hidden_BTd: Its input.

        Returns:
            Its output, of the same shape.
        """
        inner_BTb = nn.functional.linear(hidden_BTd, self.down_Lbd[index], self.down_bias_Lb[index]).relu_()
        return hidden_BTd + nn.functional.linear(inner_BTb, self.up_Ldb[index], self.up_bias_Ld[index])

    def forward(self, hidden_LNd: Tensor) -> Tensor:
        """All layers' adapters at once, each on its own inputs.

        Args:
            hidden_LNd: Inputs of each layer, N tokens each.

        Returns:
            Outputs of each adapter, of the same shape.
        """
        inner_LNb = torch.baddbmm(self.down_bias_Lb[:, None], hidden_LNd, self.down_Lbd.mT).relu()
        return hidden_LNd + torch.baddbmm(self.up_bias_Ld[:, None], inner_LNb, self.up_Ldb.mT)
