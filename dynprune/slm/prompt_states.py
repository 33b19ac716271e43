"""Running prompts, each part once: configurations share everything below the first layer in which they differ.

What a layer makes of a prompt depends on the layers below it that are pruned, and on nothing else. So the outputs, keys and
values of a prompt's layers form a tree, a node for each choice of the layers up to some depth; a new configuration starts
from the deepest node on its path. A search that adds one layer to its parent runs the layers above that one only.

Shapes: B = prompts run together, L = layers, T = tokens, d = hidden size, H = key-value heads, w = their width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from dynprune.slm.cache import KeyValues, keys_and_values
from dynprune.slm.loading import SLM
from dynprune.slm.padding import left_padded
from dynprune.slm.pruning import LayerPruner, starting_at

Prompt = tuple[int, ...]
# Whether each layer is pruned, from layer 0 on.
Choices = tuple[bool, ...]

# A pass over so many tokens is about as fast, by the token, as over more. More prompts at once share less: siblings are run
# together then, not one from the other.
_TOKENS_AT_ONCE = {"cpu": 256}
_TOKENS_AT_ONCE_ELSEWHERE = 16384


def tokens_at_once(slm: SLM) -> int:
    """Tokens of a pass beyond which more rows together are not faster, by the token, on the SLM's device."""
    return _TOKENS_AT_ONCE.get(slm.device.type, _TOKENS_AT_ONCE_ELSEWHERE)


@dataclass(frozen=True)
class _Node:
    """The output of one layer for one prompt, (T, d), and its keys and values, ``None`` where it is pruned."""

    output_Td: Tensor
    key_values: KeyValues | None

    def copied(self) -> "_Node":
        """The same without the rest of the group's tensors, which a view would keep."""
        own = self.key_values
        return _Node(self.output_Td.clone(), KeyValues(own.keys.clone(), own.values.clone()) if own else None)

    @property
    def nbytes(self) -> int:
        own = self.key_values
        return self.output_Td.nbytes + (own.keys.nbytes + own.values.nbytes if own else 0)


def check_capacity(capacity: int) -> None:
    """Checks the memory for what prompts share.

    Raises:
        ValueError: If it is negative.
    """
    if capacity < 0:
        raise ValueError(f"hardware.shared_gib={capacity / 2**30:g} is negative; allowed: 0, which shares nothing, or more")


class PromptStates:
    """Keeps what prompts' layers made, up to some memory; what was used longest ago goes first.

    Attributes:
        held_bytes: Memory that is in use.
    """

    def __init__(self, capacity: int) -> None:
        """Starts empty.

        Args:
            capacity: Bytes to keep at most; 0 keeps nothing.

        Raises:
            ValueError: If it is negative.
        """
        check_capacity(capacity)
        self._capacity = capacity
        self._nodes: OrderedDict[tuple[Prompt, Choices], _Node] = OrderedDict()
        self.held_bytes = 0

    def run(
        self, slm: SLM, pruner: LayerPruner, prompts: Sequence[Prompt], configurations: Sequence[Choices]
    ) -> list[list[KeyValues | None]]:
        """Runs prompts, each under its configuration.

        Args:
            slm: The SLM.
            pruner: Its pruner, entered; it is left with the configurations of some of the prompts.
            prompts: The prompts.
            configurations: As many configurations, all L layers each.

        Returns:
            For each prompt its keys and values by layer, ``None`` where pruned.
        """
        limit = tokens_at_once(slm)
        # A prompt's configurations in the order of the tree, so that each finds what it shares with the one before.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], configurations[i]))
        states: dict[int, list[KeyValues | None]] = {}
        while len(states) < len(order):
            left = order[len(states) :]
            paths = [self._path(prompts[left[0]], configurations[left[0]])]
            for index in left[1:]:
                if (len(paths) + 1) * len(prompts[left[0]]) > limit:
                    break
                path = self._path(prompts[index], configurations[index])
                if len(path) != len(paths[0]):
                    break
                paths.append(path)
            group = left[: len(paths)]
            new = self._run_group(slm, pruner, [prompts[i] for i in group], [configurations[i] for i in group], paths)
            states.update(zip(group, new, strict=True))
        return [states[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def _run_group(
        self,
        slm: SLM,
        pruner: LayerPruner,
        prompts: Sequence[Prompt],
        configurations: Sequence[Choices],
        paths: Sequence[list[_Node]],
    ) -> list[list[KeyValues | None]]:
        first, width = len(paths[0]), len(prompts[0])
        states = [[node.key_values for node in path] for path in paths]
        if first == slm.num_layers:
            return states
        lengths = [len(prompt) for prompt in prompts]
        cache, outputs = DynamicCache(), _Outputs()
        handles = [layer.register_forward_hook(outputs) for layer in slm.layers[first:]] if self._capacity else []
        known = starting_at(slm, first, _padded([path[-1].output_Td for path in paths], width)) if first else nullcontext()
        pruned_BL = torch.tensor(configurations)
        pruner.prune(pruned_BL)
        try:
            with known:
                slm.model(
                    **left_padded(prompts, slm.tokenizer.pad_token_id, slm.device, width),
                    cache=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            for handle in handles:
                handle.remove()
        among_kept_BL = ((~pruned_BL).cumsum(dim=0) - 1).tolist()
        for row, (prompt, configuration, length) in enumerate(zip(prompts, configurations, lengths, strict=True)):
            slots = slice(width - length, None)
            for index in range(first, len(configuration)):
                pruned = configuration[index]
                own = None if pruned else keys_and_values(cache, index, among_kept_BL[row][index], slots)
                states[row].append(own)
                if self._capacity:
                    node = _Node(outputs[index - first][row, width - length :], own)
                    self._keep(prompt, configuration[: index + 1], node if len(prompts) == 1 else node.copied())
            if self._capacity:
                # Puts the new nodes in the order in which they go.
                self._path(prompt, configuration)
        self._evict()
        return states

    def _path(self, prompt: Prompt, configuration: Choices) -> list[_Node]:
        """The nodes of a configuration that are there, from layer 0 on."""
        path = []
        for depth in range(1, len(configuration) + 1):
            node = self._nodes.get((prompt, configuration[:depth]))
            if node is None:
                break
            path.append(node)
        # Those nearer to the root are used by more configurations, and without them the others are lost: they go last.
        for depth in range(len(path), 0, -1):
            self._nodes.move_to_end((prompt, configuration[:depth]))
        return path

    def _keep(self, prompt: Prompt, choices: Choices, node: _Node) -> None:
        if (prompt, choices) not in self._nodes:
            self._nodes[prompt, choices] = node
            self.held_bytes += node.nbytes

    def _evict(self) -> None:
        while self.held_bytes > self._capacity:
            _, node = self._nodes.popitem(last=False)
            self.held_bytes -= node.nbytes


class _Outputs(list[Tensor]):
    """A forward hook that keeps what layers return."""

    def __call__(self, module: object, arguments: object, output: Tensor) -> None:
        self.append(output)


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Stacks (T, d) tensors, zeros on the left."""
    if len(rows) == 1 and rows[0].shape[0] == width:
        return rows[0][None]
    padded = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for place, row in zip(padded, rows, strict=True):
        place[width - row.shape[0] :] = row
    return padded
