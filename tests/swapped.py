"""An independent way to prune, for oracles: in a copy of the model, the pruned layers' modules are other ones."""

import copy
from collections.abc import Iterable

import torch

from dynprune.adapters.stack import AdapterStack


def random_adapters(num_layers: int = 4, **settings) -> AdapterStack:
    """Adapters that change a lot, so that it shows where one stands."""
    torch.manual_seed(1)
    stack = AdapterStack(num_layers, 32, 4, **settings).requires_grad_(False)
    for value in stack.state_dict().values():
        value.copy_(torch.randn_like(value) * 0.3)
    return stack


class StandIn(torch.nn.Module):
    """The adapter of a layer as a module in its place, for texts without padding and cache."""

    def __init__(self, stack: AdapterStack, index: int) -> None:
        super().__init__()
        self.stack, self.index = stack, index

    def forward(self, hidden, *args, **kwargs):
        return self.stack.layer(self.index, hidden, torch.arange(hidden.shape[1])[None])


def swapped(model, stack: AdapterStack, pruned: Iterable[int]):
    """A copy of a model with adapters for some of its layers."""
    model = copy.deepcopy(model)
    for index in pruned:
        model.get_decoder().layers[index] = StandIn(stack, index)
    return model


def target_logits(model, prompt, target) -> torch.Tensor:
    """The logits that a model has for each token of a target behind a prompt, alone in its batch."""
    return model(input_ids=torch.tensor([[*prompt, *target]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
