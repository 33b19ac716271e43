"""The kinds of encoders, `router.inputs`."""

from collections.abc import Mapping
from typing import Any

from dynprune.router.constant import ConstantEncoder
from dynprune.router.encoder import Encoder, TextEncoder
from dynprune.router.slm_states import SlmStatesEncoder
from dynprune.slm.loading import SLM


def build_encoder(inputs: str, arguments: Mapping[str, Any], slm: SLM | None) -> Encoder:
    """Builds the encoder that `Encoder.arguments` described.

    Args:
        inputs: What it reads.
        arguments: What it was built with.
        slm: The SLM that is pruned, for the encoder that reads its states.

    Raises:
        ValueError: If there is no such kind, an argument is wrong, or the SLM is needed and not given.
    """
    if inputs == TextEncoder.inputs:
        return TextEncoder(**arguments)
    if inputs == ConstantEncoder.inputs:
        return ConstantEncoder()
    if inputs != SlmStatesEncoder.inputs:
        raise ValueError(f"router.inputs={inputs!r} is unknown; allowed: query, slm_states, none")
    if slm is None:
        raise ValueError("this router reads the SLM's states; load it with the SLM: load_router(folder, slm)")
    return SlmStatesEncoder(slm, **arguments)
