"""The best linear adapters in closed form: reduced-rank ridge regression of what each layer adds, from one pass of the teacher.

For a layer with inputs x and residuals r = output − input, the map B of rank b and the bias c that minimise

    Σ ‖r − Bx − c‖² + λ‖B‖²

are, with the moments S_xx = Σ (x − x̄)(x − x̄)ᵀ + λI and S_rx = Σ (r − r̄)(x − x̄)ᵀ: B = P Pᵀ S_rx S_xx⁻¹, where the columns of P
are the b leading eigenvectors of S_rx S_xx⁻¹ S_rxᵀ, and c = r̄ − B x̄ (Izenman, 1975; with the ridge, Mukherjee and Zhu, 2011).
Only moments are kept, in float64: memory does not grow with the number of samples. With b = d it is the full linear map, as in
ReplaceMe (Shopkhoev et al., 2025).

Shapes: L = layers, S = L + 1 states, N = tokens, d = hidden size, b = bottleneck.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dynprune.adapters.stack import AdapterStack


class Moments:
    """First and second moments of the inputs and residuals of all layers.

    Attributes:
        batches: How many batches were added.
        count: How many tokens.
    """

    def __init__(self, num_layers: int, hidden_size: int, device: torch.device) -> None:
        """Starts at zero."""
        self.batches = self.count = 0
        self._x_Ld = torch.zeros(num_layers, hidden_size, dtype=torch.float64, device=device)
        self._r_Ld = torch.zeros_like(self._x_Ld)
        self._xx_Ldd = torch.zeros(num_layers, hidden_size, hidden_size, dtype=torch.float64, device=device)
        self._rx_Ldd = torch.zeros_like(self._xx_Ldd)

    def add(self, states_SNd: Tensor) -> None:
        """Adds the states of some tokens, as `HiddenStateStream` yields them."""
        for index, (input_Nd, output_Nd) in enumerate(pairwise(states_SNd)):
            # Layer by layer: float64 copies of all layers at once would be the largest thing in memory.
            x_Nd = input_Nd.to(self._x_Ld)
            r_Nd = output_Nd.to(self._x_Ld) - x_Nd
            self._x_Ld[index] += x_Nd.sum(dim=0)
            self._r_Ld[index] += r_Nd.sum(dim=0)
            self._xx_Ldd[index].addmm_(x_Nd.T, x_Nd)
            self._rx_Ldd[index].addmm_(r_Nd.T, x_Nd)
        self.batches += 1
        self.count += states_SNd.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """All that they hold, for `load`."""
        counts = torch.tensor([self.batches, self.count])
        return {"counts": counts, "x": self._x_Ld, "r": self._r_Ld, "xx": self._xx_Ldd, "rx": self._rx_Ldd}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what others of the same size held."""
        self.batches, self.count = tensors["counts"].tolist()
        for name, value in self.tensors().items():
            value.copy_(tensors[name])

    def solve(self, index: int, bottleneck: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """The best adapter of one layer.

        Args:
            index: Number of the layer.
            bottleneck: b, 1..d.
            ridge: λ as a share of the inputs' mean variance times the number of tokens.

        Returns:
            down_bd, up_db and up_bias_d, in float64.

        Raises:
            ValueError: If no token was added.
        """
        if not self.count:
            raise ValueError("there is no token to fit the adapters to; raise adapter.max_samples")
        mean_x_d, mean_r_d = self._x_Ld[index] / self.count, self._r_Ld[index] / self.count
        xx_dd = self._xx_Ldd[index] - self.count * torch.outer(mean_x_d, mean_x_d)
        rx_dd = self._rx_Ldd[index] - self.count * torch.outer(mean_r_d, mean_x_d)
        xx_dd.diagonal().add_(ridge * xx_dd.diagonal().mean())
        full_dd = torch.linalg.solve(xx_dd, rx_dd.T).T
        # Ascending eigenvalues: the leading ones are the last.
        up_db = torch.linalg.eigh(full_dd @ rx_dd.T).eigenvectors[:, -bottleneck:]
        down_bd = up_db.T @ full_dd
        return down_bd, up_db, mean_r_d - up_db @ (down_bd @ mean_x_d)


def moments_for(adapters: AdapterStack) -> Moments:
    """Moments for `fit_ridge`, to which the states of the teacher are to be added batch by batch.

    Without the first tokens where these are treated apart.

    Args:
        adapters: The adapters to fit, on whose device it is computed.

    Raises:
        ValueError: If the adapters are not linear, or have a bottleneck above their width.
    """
    if adapters.activation != "identity":
        raise ValueError(
            f"adapter.fit=ridge solves for linear adapters, but adapter.activation={adapters.activation}; "
            "allowed with it: adapter.activation=identity"
        )
    if adapters.bottleneck > adapters.hidden_size:
        raise ValueError(
            f"adapter.bottleneck={adapters.bottleneck} is above the SLM's width; allowed with adapter.fit=ridge: 1 to "
            f"{adapters.hidden_size}"
        )
    return Moments(adapters.num_layers, adapters.hidden_size, adapters.down_Lbd.device)


@torch.no_grad()
def fit_ridge(adapters: AdapterStack, moments: Moments, ridge: float) -> None:
    """Sets all adapters to the best linear ones.

    Args:
        adapters: The adapters; what they held is lost.
        moments: From `moments_for` of these adapters.
        ridge: See `Moments.solve`.

    Raises:
        ValueError: If there are no tokens.
    """
    adapters.down_bias_Lb.zero_()
    for index in range(adapters.num_layers):
        adapters.down_Lbd[index], adapters.up_Ldb[index], adapters.up_bias_Ld[index] = moments.solve(
            index, adapters.bottleneck, ridge
        )
