"""A pruned model in EleutherAI's evaluation harness: ``python -m dynprune.harness --model dynprune --model_args pretrained=…``.

The harness takes models from a registry, in which packages cannot enter theirs before its command starts; so this module enters
one and starts it. It needs the extra ``harness``. Answers are greedy, as all figures of this project are measured.

Shapes: B = requests of a batch, K = tokens kept for the loss, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dynprune.dynamic_model import DynamicModel
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.loading import SLM
from dynprune.slm.padding import left_padded
from dynprune.slm.pruning import LayerPruner, configuration_mask

Pair = tuple[tuple[str, str], list[int], list[int]]
"""What the harness asks the likelihood of: context and continuation, and both as tokens."""
_LONGEST = 2048


@register_model("dynprune")
class DynamicLM(TemplateLM):
    """A `DynamicModel` as the harness sees it: texts in, likelihoods and texts out.

    The router reads the context of a request, in which messages and tools are no longer told apart.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        budget: float | None = None,
        layers: str | int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: A folder of ``stage=export``, or a Hub id.
            revision: Commit or tag on the Hub.
            budget: The nominal speedup to reach, 0..1; the router's own choice by default.
            layers: Layers to prune for all requests instead of asking the router: ``3+7``, or ``none``.
            dtype: See `DynamicModel.from_pretrained`.
            device: Torch device; the CPU by default, and where the harness asks for a GPU that is not there.
            batch_size: Requests run together.
            max_length: Tokens of a request, at most; that of the SLM, and no more than 2048, by default.
            max_gen_toks: Tokens of an answer, at most, where a task does not say.

        Raises:
            ValueError: If an argument is not possible.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} is no number of requests; allowed: 1 or more")
        if budget is not None and layers is not None:
            raise ValueError(f"budget={budget} asks the router, layers={layers} does not; leave one of the two out")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            # The harness's command asks for cuda:0 unless it is told otherwise.
            device = "cpu"
        self.model = DynamicModel.from_pretrained(pretrained, revision, dtype, device)
        self.tokenizer = self.model.slm.tokenizer
        self._fixed = None if layers is None else _layers(str(layers), self.model.slm.num_layers)
        self._budget = budget
        self._batch_size = int(batch_size)
        longest = int(getattr(self.model.slm.model.config.get_text_config(), "max_position_embeddings", _LONGEST))
        self.max_length = max_length or min(longest, _LONGEST)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.model.slm.tokenizer.eos_token_id
        return token

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps tokenised requests under."""
        return self.model.slm.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as one text."""
        tokenizer = self.model.slm.tokenizer
        return str(tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text as tokens, without special ones unless they are asked for."""
        tokens: list[int] = self.model.slm.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        return tokens

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats; the router sees nothing of them."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs: list[Pair] = [(("", text), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        chosen = self._choose([context for (context, _), _, _ in requests])
        # Padding costs what tokens cost: texts of similar length together, the longest first.
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place][1]) - len(requests[place][2]))
        found: dict[int, tuple[float, bool]] = {}
        slm = self.model.slm
        with LayerPruner(slm, self.model.adapters) as pruner, tqdm(total=len(order), disable=disable_tqdm) as bar:
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                pairs = [requests[place] for place in batch]
                # One token more than the SLM reads: the last one is only predicted.
                texts = [[*context, *continuation][-self.max_length - 1 :] for _, context, continuation in pairs]
                pruner.prune(configuration_mask(slm, [chosen[place] for place in batch]))
                keep = max(len(continuation) for _, _, continuation in pairs)
                logits_BKV = slm.model(
                    **left_padded([text[:-1] for text in texts], slm.tokenizer.pad_token_id, slm.device),
                    use_cache=False,
                    logits_to_keep=keep,
                ).logits
                for place, (_, _, continuation), logits_KV in zip(batch, pairs, logits_BKV, strict=True):
                    log_p_KV = logits_KV[-len(continuation) :].float().log_softmax(dim=-1)
                    wanted_K1 = torch.tensor(continuation, device=slm.device)[-len(log_p_KV) :, None]
                    greedy = bool((log_p_KV.argmax(dim=-1) == wanted_K1[:, 0]).all())
                    found[place] = (float(log_p_KV.gather(1, wanted_K1).sum()), greedy)
                bar.update(len(batch))
        return [found[place] for place in range(len(requests))]

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop texts."""
        contexts, settings = [request.args[0] for request in requests], [request.args[1] for request in requests]
        stops = [_stops(one) for one in settings]
        slm = self.model.slm
        asked = [
            Request(
                tuple(self.tok_encode(context)[-self.max_length + limit :]),
                layers,
                limit,
                give_up=partial(_has_ended, slm, stop),
            )
            for context, layers, limit, stop in zip(
                contexts,
                self._choose(contexts),
                [int(one.get("max_gen_toks", self.max_gen_toks)) for one in settings],
                stops,
                strict=True,
            )
        ]
        with LayerPruner(slm, self.model.adapters) as pruner:
            answers = generate_all(slm, pruner, asked, self._batch_size)
            said = dict(tqdm(answers, total=len(asked), disable=disable_tqdm))
        return [postprocess_generated_text(slm.decode(said[place].token_ids), stop, None) for place, stop in enumerate(stops)]

    def _choose(self, contexts: Sequence[str]) -> list[tuple[int, ...]]:
        if self._fixed is not None:
            return [self._fixed] * len(contexts)
        # Tasks ask about one context again and again.
        distinct = list(dict.fromkeys(contexts))
        chosen: dict[str, tuple[int, ...]] = {}
        for start in range(0, len(distinct), self._batch_size):
            some = distinct[start : start + self._batch_size]
            layers = self.model.route(some, budget=self._budget)
            chosen.update(zip(some, layers, strict=True))  # type: ignore[arg-type]
        return [chosen[context] for context in contexts]


def _layers(text: str, num_layers: int) -> tuple[int, ...]:
    if text == "none":
        return ()
    parts = text.split("+")
    if not all(part.isdigit() and int(part) < num_layers for part in parts):
        raise ValueError(f"layers={text} are no layers; allowed: none, or numbers from 0 to {num_layers - 1}, such as 3+7")
    return tuple(sorted({int(part) for part in parts}))


def _has_ended(slm: SLM, stops: Sequence[str], said: tuple[int, ...]) -> bool:
    text = slm.decode(said)
    return any(stop in text for stop in stops)


def _stops(settings: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer.

    Raises:
        ValueError: If the task wants samples.
    """
    if settings.get("do_sample") or float(settings.get("temperature", 0) or 0) > 0:
        raise ValueError(f"a task asks for samples ({dict(settings)}), but answers are greedy; allowed: do_sample=false")
    until = settings.get("until", [])
    return [until] if isinstance(until, str) else list(until)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
