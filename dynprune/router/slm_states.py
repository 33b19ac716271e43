"""The SLM's own states as the router's input: its first layers embed the query, so that no second encoder is needed.

Legend: B = batch, T = tokens, d = hidden size of the SLM.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dynprune.data.prompts import render_prompt
from dynprune.data.tasks import Query
from dynprune.router.encoder import Encoder
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import stopping_before


class SlmStatesEncoder(Encoder):
    """Embeds the SLM's prompt as the mean of its tokens' states after the first m layers, at unit length.

    The mean, since so early the last token, the same for all prompts, has hardly looked at the others yet. The first token is
    left out: causal attention lets it see no query, and its activation, up to a thousand times that of others (Sun et al.,
    2024, arXiv 2402.17762), would be nearly all of the mean. Only layers from m on may be pruned.

    The SLM is shared and frozen: it is no part of the router's parameters, of its checkpoints or of its copies.
    """

    inputs: ClassVar[str] = "slm_states"
    trainable = False

    def __init__(self, slm: SLM, first_layers: int) -> None:
        """Binds the SLM.

        Args:
            slm: The SLM, whose layers are not pruned while it embeds.
            first_layers: m, how many layers are run, 1..L − 1.

        Raises:
            ValueError: If there are not so many layers, or none would be left to prune.
        """
        super().__init__()
        if not 1 <= first_layers < slm.num_layers:
            raise ValueError(
                f"router.slm_layers={first_layers} does not fit {slm.name}, which has {slm.num_layers} layers and must have "
                f"one left to prune; allowed: 1..{slm.num_layers - 1}"
            )
        self.name = f"the states of {slm.name}"
        self.first_layers = first_layers
        self._slm = slm

    @property
    def size(self) -> int:
        """The hidden size d of the SLM."""
        return self._slm.hidden_size

    def arguments(self) -> dict[str, Any]:
        """How many layers are run."""
        return {"first_layers": self.first_layers}

    def render(self, query: Query) -> str:
        """The SLM's own prompt."""
        return render_prompt(self._slm.tokenizer, query)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Turns prompts into ``input_ids_BT`` and ``attention_mask_BT``, padded on the left."""
        # Rendered text holds the special tokens already.
        features = self._slm.tokenizer(list(texts), add_special_tokens=False, padding=True, return_tensors="pt")
        return {"input_ids_BT": features["input_ids"], "attention_mask_BT": features["attention_mask"]}

    @torch.no_grad()
    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Runs the first layers.

        Args:
            input_ids_BT: Token ids, each row with two real tokens at least.
            attention_mask_BT: 1 at tokens, 0 at padding.

        Returns:
            embedding_Bd in float32, of unit length, on the device of the ids.
        """
        ids_BT, attention_BT = input_ids_BT.to(self._slm.device), attention_mask_BT.to(self._slm.device)
        positions_BT = (attention_BT.cumsum(dim=1) - 1).clamp(min=0)
        with stopping_before(self._slm, self.first_layers) as reached:
            self._slm.model(input_ids=ids_BT, attention_mask=attention_BT, position_ids=positions_BT, use_cache=False)
        [states_BTd] = reached
        counted_BT1 = (positions_BT > 0)[:, :, None]
        mean_Bd = (states_BTd.float() * counted_BT1).sum(dim=1) / counted_BT1.sum(dim=1)
        return F.normalize(mean_Bd, dim=1).to(input_ids_BT.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same object: a copied router shares the SLM."""
        return self
