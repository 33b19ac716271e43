"""An SLM, its adapters and a router as one model: what a run leaves to those who only want answers.

On disk or on the Hub: a folder with ``dynprune.json`` (what rebuilds the SLM, and the router's cost), ``adapters/``,
``router/``, ``delta/`` where a LoRA delta of one's own belongs to the SLM, and ``README.md``, the model card. The SLM itself is
there by reference. Nothing in it is executed: weights are safetensors, and the SLM is loaded by one of the loaders named here.
"""

import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers.generation.streamers import BaseStreamer

from dynprune.adapters.checkpoint import load_adapters, save_adapters
from dynprune.adapters.stack import AdapterStack
from dynprune.atomic import replacing
from dynprune.data.prompts import prompt_tokens
from dynprune.data.tasks import Query
from dynprune.router.budget import likeliest, same_count
from dynprune.router.checkpoint import load_router, save_router
from dynprune.router.policies import Policy, build_policy
from dynprune.router.router import Router
from dynprune.slm.cache import ReservingCache
from dynprune.slm.decoding import decode_pruned
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.loading import SLM, delta_folder, is_shipped_delta, load_gguf, load_hf, load_tiny, resolve_dtype
from dynprune.slm.pruning import LayerPruner

_FORMAT = 1
_DESCRIPTION = "dynprune.json"
_ADAPTERS, _ROUTER, _DELTA, _CARD = "adapters", "router", "delta", "README.md"
_LOADERS: Mapping[str, Callable[..., SLM]] = {"hf": load_hf, "gguf": load_gguf, "tiny": load_tiny}
_BATCH_SIZE = 16

Messages = str | Sequence[Mapping[str, str]]
"""What is asked: the user's words, or chat messages ``{"role", "content"}``."""
Tools = Sequence[Mapping[str, Any]]
"""Functions that may be called: ``{"name", "description", "parameters"}``, or OpenAI's form with ``function`` around it."""


@dataclass(frozen=True)
class Routed:
    """An answer and what it was made with.

    Attributes:
        text: The answer.
        pruned_layers: The layers that were pruned, in ascending order.
        truncated: Whether the token limit cut it off.
    """

    text: str
    pruned_layers: tuple[int, ...]
    truncated: bool


@dataclass
class DynamicModel:
    """An SLM that prunes other layers for each query.

    Attributes:
        slm: The SLM, which is whole outside of calls.
        adapters: What stands in for pruned layers; ``None`` where nothing does.
        router: What chooses the layers.
        policy: How it chooses.
        source: What the SLM was loaded by and from: ``{"kind": "hf", "arguments": {"name": …}}``.
        router_layers: What a pass of the router costs, in layers of the SLM.
        card: The model card, in Markdown.
    """

    slm: SLM
    adapters: AdapterStack | None
    router: Router
    policy: Policy
    source: Mapping[str, Any]
    router_layers: float
    card: str = field(default="", repr=False)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, revision: str | None = None, dtype: str | None = None, device: str = "cpu"
    ) -> Self:
        """Loads a model from a folder or from the Hub.

        Args:
            path_or_hub_id: A folder that `save_pretrained` wrote, or a Hub id.
            revision: Commit or tag on the Hub.
            dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, for the router's frozen encoder too; that of the run it
                came from by default.
            device: Torch device.

        Raises:
            ValueError: If it is not there, or its files do not belong together.
        """
        folder = Path(path_or_hub_id)
        if not folder.is_dir():
            folder = _downloaded(str(path_or_hub_id), revision)
        description = _described(folder)
        source = description["slm"]
        arguments = dict(source["arguments"])
        if arguments.get("delta") == _DELTA:
            arguments["delta"] = str(folder / _DELTA)
        if dtype is not None:
            arguments["dtype"] = dtype
        slm = _LOADERS[source["kind"]](**arguments, device=device)
        adapters = load_adapters(folder / _ADAPTERS) if (folder / _ADAPTERS).is_dir() else None
        router, extra = load_router(folder / _ROUTER, slm, None if dtype is None else resolve_dtype(dtype, device))
        _check_fits(folder, slm, adapters, router)
        card = folder / _CARD
        return cls(
            slm,
            adapters.to(slm.device, slm.model.dtype) if adapters is not None else None,
            router.to(slm.device),
            build_policy(extra["policy"]),
            {**source, "arguments": arguments},
            float(description["router_layers"]),
            card.read_text(encoding="utf-8") if card.is_file() else "",
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model into a folder, which appears when it is complete.

        Args:
            folder: A new or empty folder, or one with a model, which is replaced as a whole.

        Raises:
            ValueError: The folder holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / _DESCRIPTION).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something else than a model; allowed: a new folder, or one with {_DESCRIPTION}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            arguments = {key: value for key, value in self.source["arguments"].items() if key != "device"}
            delta = arguments.get("delta")
            if delta is not None and not is_shipped_delta(delta):
                shutil.copytree(delta_folder(delta), new / _DELTA)
                arguments["delta"] = _DELTA
            if self.adapters is not None:
                save_adapters(self.adapters, new / _ADAPTERS, self.slm.name)
            save_router(self.router, new / _ROUTER, {"policy": self.policy.config(), "slm": self.slm.name})
            description = {
                "format": _FORMAT,
                "slm": {"kind": self.source["kind"], "arguments": arguments},
                "router_layers": self.router_layers,
            }
            with replacing(new / _DESCRIPTION) as path:
                path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            with replacing(new / _CARD) as path:
                path.write_text(self.card, encoding="utf-8")
            old = Path(scratch) / "old"
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Uploads the model to the Hub.

        Args:
            repo_id: ``user/name``; created where it is missing.
            private: Whether nobody else sees it.
            token: Of the Hub; that of ``hf auth login`` by default.

        Returns:
            Its address.
        """
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "model")
            api.upload_folder(repo_id=repo_id, folder_path=Path(scratch) / "model")
        return str(address)

    def route(
        self, messages: Messages | Sequence[Messages], tools: Tools | Sequence[Tools] = (), budget: float | None = None
    ) -> tuple[int, ...] | list[tuple[int, ...]]:
        """Says which layers would be pruned.

        Args:
            messages: What is asked; a list of such for several.
            tools: The functions that may be called; of several questions a list for each, or one for all.
            budget: The nominal speedup to reach, 0..1, the router's own cost included; the router's own choice by default.

        Returns:
            The layers in ascending order; of several questions a list.

        Raises:
            ValueError: If the router cannot prune so many layers.
        """
        queries = _queries(messages, tools)
        chosen = self._choose(queries, budget)
        return chosen if _are_several(messages) else chosen[0]

    def generate(
        self,
        messages: Messages | Sequence[Messages],
        tools: Tools | Sequence[Tools] = (),
        budget: float | None = None,
        max_new_tokens: int = 256,
        return_routing: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> str | Routed | list[str] | list[Routed]:
        """Answers, each question with layers of its own pruned; greedily, as all figures of this project are measured.

        Args:
            messages: See `route`.
            tools: See `route`.
            budget: See `route`.
            max_new_tokens: Tokens of an answer, at most.
            return_routing: Whether to say which layers were pruned.
            streamer: One of transformers' streamers, for a single question; it gets the prompt and then each token.

        Returns:
            The answer, or a `Routed`; of several questions a list.

        Raises:
            ValueError: If the router cannot prune so many layers, there is no room for an answer, or several answers are to be
                streamed.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for an answer; allowed: at least 1")
        queries = _queries(messages, tools)
        if streamer is not None and _are_several(messages):
            raise ValueError("streamer takes the answer to one question, but messages has several; leave one of the two out")
        chosen = self._choose(queries, budget)
        prompts = [prompt_tokens(self.slm.tokenizer, query) for query in queries]
        if streamer is not None:
            answers = [self._stream(prompts[0], chosen[0], max_new_tokens, streamer)]
        else:
            answers = self._generate(prompts, chosen, max_new_tokens)
        said: list[Any] = answers if return_routing else [answer.text for answer in answers]
        return said if _are_several(messages) else said[0]

    @contextmanager
    def pruned(self, layers: Sequence[int]) -> Iterator[SLM]:
        """The SLM with fixed layers pruned, for what knows no queries, such as ``transformers.pipeline``.

        A pipeline gets one text, in which messages and tools are no longer told apart, so that no router can choose for it:
        choose first (`route`), then run it inside.

        Args:
            layers: The layers.
        """
        with LayerPruner(self.slm, self.adapters) as pruner:
            pruner.prune(layers)
            yield self.slm

    @torch.inference_mode()
    def _choose(self, queries: Sequence[Query], budget: float | None) -> list[tuple[int, ...]]:
        rule = likeliest if budget is None else same_count(self._layers_for(budget))
        encoder = self.router.encoder
        features = encoder.tokenize([encoder.render(query) for query in queries])
        outputs = self.router(self.router.encode({name: tensor.to(self.slm.device) for name, tensor in features.items()}))
        return [tuple(mask_L.nonzero()[:, 0].tolist()) for mask_L in self.policy.mode(outputs, rule)]

    def _layers_for(self, budget: float) -> int:
        layers = budget * self.slm.num_layers + self.router_layers
        most = self.policy.k_max
        if not budget >= 0 or layers > most:
            highest = max(0.0, (most - self.router_layers) / self.slm.num_layers)
            raise ValueError(
                f"budget={budget} needs {layers:g} pruned layers, the router's cost included, but it prunes 0 to {most}; "
                f"allowed: 0 to {highest:.2f}, or None for the router's own choice"
            )
        # At least the speedup that is asked for; the slack is for products such as 0.1 · 30.
        return math.ceil(layers - 1e-9)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[tuple[int, ...]], chosen: Sequence[tuple[int, ...]], limit: int) -> list[Routed]:
        requests = [Request(prompt, layers, limit) for prompt, layers in zip(prompts, chosen, strict=True)]
        with LayerPruner(self.slm, self.adapters) as pruner:
            said = dict(generate_all(self.slm, pruner, requests, _BATCH_SIZE))
        return [
            Routed(self.slm.decode(said[place].token_ids), layers, said[place].truncated) for place, layers in enumerate(chosen)
        ]

    @torch.inference_mode()
    def _stream(self, prompt: tuple[int, ...], layers: tuple[int, ...], limit: int, streamer: BaseStreamer) -> Routed:
        streamer.put(torch.tensor([prompt]))
        tokens: list[int] = []
        stopped = False
        with LayerPruner(self.slm, self.adapters) as pruner:
            for token_11 in decode_pruned(self.slm, pruner, prompt, layers, limit, ReservingCache()):
                token = int(token_11)
                if stopped := token in self.slm.stop_ids:
                    break
                tokens.append(token)
                streamer.put(token_11[0].cpu())
        streamer.end()
        return Routed(self.slm.decode(tokens), layers, not stopped)


def _are_several(messages: Messages | Sequence[Messages]) -> bool:
    return not isinstance(messages, str) and not (len(messages) > 0 and isinstance(messages[0], Mapping))


def _queries(messages: Messages | Sequence[Messages], tools: Tools | Sequence[Tools]) -> list[Query]:
    several: Sequence[Any] = messages if _are_several(messages) else [messages]
    if not several:
        raise ValueError("messages is empty; allowed: a question, chat messages, or a list of such")
    of_each: Sequence[Any] = tools if tools and not isinstance(tools[0], Mapping) else [tools] * len(several)
    if len(of_each) != len(several):
        raise ValueError(f"tools has {len(of_each)} lists for {len(several)} questions; allowed: one for each, or one for all")
    return [_query(str(place), asked, functions) for place, (asked, functions) in enumerate(zip(several, of_each, strict=True))]


def _query(name: str, asked: Messages, tools: Tools) -> Query:
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(message) for message in asked]
    functions = [dict(tool.get("function", tool)) for tool in tools]
    for function in functions:
        if "name" not in function:
            raise ValueError(f"tools: {json.dumps(function)[:80]} has no name; allowed: name, description, parameters")
        function.setdefault("parameters", {"type": "object", "properties": {}})
    return Query(name, "", tuple(messages), tuple(functions), (), ())


def _downloaded(hub_id: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(hub_id, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{hub_id!r} is neither a folder nor in the local cache, and the Hub did not give it "
            f"({str(error).splitlines()[0]}); allowed: a folder that save_pretrained wrote, or a Hub id"
        ) from error


def _described(folder: Path) -> dict[str, Any]:
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {_DESCRIPTION}; allowed: a folder that save_pretrained wrote; type: dynprune stage=export"
        )
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if description.get("format") != _FORMAT:
        raise ValueError(f"{path} has format {description.get('format')}; this version of dynprune reads {_FORMAT}")
    kind, arguments = description["slm"]["kind"], description["slm"]["arguments"]
    if kind not in _LOADERS:
        raise ValueError(f"{path}: slm.kind={kind!r} is unknown; allowed: {', '.join(_LOADERS)}")
    try:
        inspect.signature(_LOADERS[kind]).bind(**arguments, device="cpu")
    except TypeError as error:
        raise ValueError(
            f"{path}: slm.arguments do not fit slm.kind={kind!r}: {error}; allowed: those that stage=export wrote"
        ) from None
    delta = arguments.get("delta")
    if delta is not None and delta != _DELTA and not is_shipped_delta(delta):
        raise ValueError(
            f"{path}: slm.arguments.delta={delta!r} lies outside of the folder; allowed: {_DELTA!r}, or a shipped one"
        )
    return description


def _check_fits(folder: Path, slm: SLM, adapters: AdapterStack | None, router: Router) -> None:
    parts = {_ROUTER: (router.num_layers, slm.hidden_size)}
    if adapters is not None:
        parts[_ADAPTERS] = (adapters.num_layers, adapters.hidden_size)
    for part, (num_layers, hidden_size) in parts.items():
        if (num_layers, hidden_size) != (slm.num_layers, slm.hidden_size):
            raise ValueError(
                f"{folder / part} was made for {num_layers} layers of width {hidden_size}, but {slm.name} has {slm.num_layers} "
                f"of width {slm.hidden_size}; allowed: the SLM that it was made for"
            )
