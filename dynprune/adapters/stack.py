"""The adapters of all layers, stacked: h + W_up act(W_down h + b_down) + b_up, one for each decoder layer.

In many SLMs the first token's states are an attention sink: hundreds of times as large as all others, and the same for every
text that starts with this token. No small module maps both kinds, so a stack may hold what each layer adds to the first token.

On a CPU a product of one token in half precision takes torch several times as long as the same one in float32, whatever its
size, so a single token goes through an adapter in float32.

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
        self._in_float32: tuple[list[tuple[int, int]], list[Tensor]] = ([], [])

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
        if self.sink_Ld is not None and positions_BT is None:
            raise ValueError(
                "these adapters treat the first token apart, but this SLM does not tell its layers the tokens' positions; "
                "make adapters for it with adapter.sink=false"
            )
        if hidden_BTd.numel() == self.hidden_size and not torch.is_grad_enabled() and _is_slow(hidden_BTd):
            return self._one_token(index, hidden_BTd, positions_BT)
        inner_BTb = self._activate(nn.functional.linear(hidden_BTd, self.down_Lbd[index], self.down_bias_Lb[index]))
        change_BTd = nn.functional.linear(inner_BTb, self.up_Ldb[index], self.up_bias_Ld[index])
        if self.sink_Ld is not None and positions_BT is not None:
            change_BTd = torch.where(positions_BT[..., None] == 0, self.sink_Ld[index].to(change_BTd.dtype), change_BTd)
        return hidden_BTd + change_BTd

    def _one_token(self, index: int, hidden_11d: Tensor, positions_11: Tensor | None) -> Tensor:
        """What `layer` gives, for a single token and computed in float32."""
        if self.sink_Ld is not None and positions_11 is not None and positions_11.item() == 0:
            return hidden_11d + self.sink_Ld[index].to(hidden_11d.dtype)
        down_Lbd, down_bias_Lb, up_Ldb, up_bias_Ld = self._weights_in_float32()
        hidden_d = hidden_11d.flatten().float()
        inner_b = self._activate(torch.addmv(down_bias_Lb[index], down_Lbd[index], hidden_d))
        out_d = torch.addmv(up_bias_Ld[index], up_Ldb[index], inner_b).add_(hidden_d)
        return out_d.to(hidden_11d.dtype).view_as(hidden_11d)

    def _weights_in_float32(self) -> list[Tensor]:
        """The weights in float32, kept until they change."""
        weights = (self.down_Lbd, self.down_bias_Lb, self.up_Ldb, self.up_bias_Ld)
        # A weight that was made for inference alone counts no changes, and is not trained.
        state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if self._in_float32[0] != state:
            self._in_float32 = state, [weight.detach().float() for weight in weights]
        return self._in_float32[1]

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


def _is_slow(hidden_BTd: Tensor) -> bool:
    """Whether products of one such token are slow."""
    return hidden_BTd.device.type == "cpu" and hidden_BTd.dtype in (torch.bfloat16, torch.float16)
