"""The adapters of all layers, stacked: h + W_up act(W_down h + b_down) + b_up, one for each decoder layer.

In many SLMs the first token's states are an attention sink: hundreds of times as large as all others, and the same for every
text that starts with this token. No small module maps both kinds, so a stack may hold what each layer adds to the first token.

Shapes: L = layers, B = batch, T = tokens, d = hidden size, b = bottleneck.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "identity"]


class AdapterStack(nn.Module):
    """One bottleneck adapter for each layer, their weights stacked so that all of them train in one computation.

    The output projection starts at zero, so an untrained adapter is the identity.

    Attributes:
        activation: ``relu`` as in the thesis, or ``identity``: a linear map of rank b.
        down_Lbd: W_down of each layer.
        down_bias_Lb: b_down of each layer.
        up_Ldb: W_up of each layer.
        up_bias_Ld: b_up of each layer.
        sink_Ld: What each layer adds to the first token of a text, in the place of the rest; ``None`` where the first token is
            treated like any other. It is measured, not trained.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, bottleneck: int, activation: Activation = "relu", sink: bool = False
    ) -> None:
        """Makes untrained adapters.

        Args:
            num_layers: L.
            hidden_size: d.
            bottleneck: b, the width between the two projections.
            activation: ``relu`` or ``identity``.
            sink: Whether the first token has residuals of its own, zero until they are measured.

        Raises:
            ValueError: If the bottleneck is below 1, or there is no such activation.
        """
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"adapter.bottleneck={bottleneck} must be at least 1; for example adapter.bottleneck=64")
        if activation not in ("relu", "identity"):
            raise ValueError(f"adapter.activation={activation!r} is unknown; allowed: relu, identity")
        self.activation = activation
        self.down_Lbd = nn.Parameter(torch.empty(num_layers, bottleneck, hidden_size))
        self.down_bias_Lb = nn.Parameter(torch.zeros(num_layers, bottleneck))
        self.up_Ldb = nn.Parameter(torch.zeros(num_layers, hidden_size, bottleneck))
        self.up_bias_Ld = nn.Parameter(torch.zeros(num_layers, hidden_size))
        nn.init.normal_(self.down_Lbd, std=hidden_size**-0.5)
        self.sink_Ld: Tensor | None
        self.register_buffer("sink_Ld", torch.zeros(num_layers, hidden_size) if sink else None)

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

    def layer(self, index: int, hidden_BTd: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """What the adapter of one layer puts in the layer's place.

        Args:
            index: Number of the layer.
            hidden_BTd: Its input.
            positions_BT: Positions of the tokens in their texts, or one row of them for all; needed where the first token has
                residuals of its own.

        Returns:
            Its output, of the same shape.

        Raises:
            ValueError: If positions are needed and the SLM gives its layers none.
        """
        inner_BTb = self._activate(nn.functional.linear(hidden_BTd, self.down_Lbd[index], self.down_bias_Lb[index]))
        change_BTd = nn.functional.linear(inner_BTb, self.up_Ldb[index], self.up_bias_Ld[index])
        if self.sink_Ld is not None:
            if positions_BT is None:
                raise ValueError(
                    "these adapters treat the first token apart, but this SLM does not tell its layers the tokens' positions; "
                    "make adapters for it with adapter.sink=false"
                )
            change_BTd = torch.where(positions_BT[..., None] == 0, self.sink_Ld[index].to(change_BTd.dtype), change_BTd)
        return hidden_BTd + change_BTd

    def forward(self, hidden_LNd: Tensor) -> Tensor:
        """All layers' adapters at once, each on its own inputs; no first tokens where these have residuals of their own.

        Args:
            hidden_LNd: Inputs of each layer, N tokens each.

        Returns:
            Outputs of each adapter, of the same shape.
        """
        inner_LNb = self._activate(torch.baddbmm(self.down_bias_Lb[:, None], hidden_LNd, self.down_Lbd.mT))
        return hidden_LNd + torch.baddbmm(self.up_bias_Ld[:, None], inner_LNb, self.up_Ldb.mT)

    def _activate(self, inner: Tensor) -> Tensor:
        return inner.relu_() if self.activation == "relu" else inner
