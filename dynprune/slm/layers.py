"""Finding the decoder layers of a causal LM of transformers."""

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Finds the list of decoder layers.

    Args:
        model: A decoder-only causal LM.

    Returns:
        The model's own list; index i is the layer that the forward pass runs as number i.

    Raises:
        ValueError: If the model has not exactly one list with as many members as its config has layers.
    """
    expected = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    ]
    # The decoder's list is the outermost one: lists of experts and the like lie inside its members.
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)
    ]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outermost)} lists of {expected} layers ({[name for name, _ in outermost]}), "
            "but pruning needs a decoder-only model with exactly one; for example a Llama, Qwen2, Qwen3, Mistral or Gemma 3"
        )
    return outermost[0][1]
