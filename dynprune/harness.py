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
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dynprune.dynamic_model import DynamicModel
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.loading import SLM
from dynprune.slm.padding import left_padded
from dynprune.slm.pruning import LayerPruner, configuration_mask

Pair = tuple[tuple[str, str], list[int], list[int]]
"""What the harness asks the likelihood of: context and continuation, and both as tokens."""
_UNPRUNED = "unpruned"


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
            layers: Layers to prune for all requests instead of asking the router: ``3+7``, or ``unpruned``. (The harness reads
                ``none`` as an argument that is not there.)
            dtype: See `DynamicModel.from_pretrained`.
            device: Torch device; the CPU by default, and where the harness asks for a GPU that is not there.
            batch_size: Requests run together.
            max_length: Tokens of a request, at most; what the SLM's configuration says by default.
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
        self.max_length = max_length or resolve_max_length(self.model.slm.model.config, self.tokenizer)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.model.slm.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        begin: int | None = self.model.slm.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps tokenised requests under."""
        return self.model.slm.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as one text."""
        tokenizer = self.model.slm.tokenizer
        return str(tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text as tokens, with the special ones that the tokenizer adds itself, unless the text begins with one."""
        tokenizer = self.model.slm.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, tokenizer.decode([self.prefix_token_id]))
        tokens: list[int] = tokenizer.encode(string, add_special_tokens=add_special_tokens)
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
        """Answers, each up to the first of its stop texts.

        Raises:
            ValueError: If a task wants samples, or leaves no room for its contexts.
        """
        contexts = [request.args[0] for request in requests]
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        asked = [
            self._request(context, layers, own)
            for context, layers, own in zip(contexts, self._choose(contexts), settings, strict=True)
        ]
        slm = self.model.slm
        with LayerPruner(slm, self.model.adapters) as pruner:
            answers = generate_all(slm, pruner, asked, self._batch_size)
            said = dict(tqdm(answers, total=len(asked), disable=disable_tqdm))
        return [
            postprocess_generated_text(slm.decode(said[place].token_ids), own["until"], None)
            for place, own in enumerate(settings)
        ]

    def _request(self, context: str, layers: tuple[int, ...], settings: Mapping[str, Any]) -> Request:
        if settings["do_sample"]:
            raise ValueError(f"a task asks for samples ({dict(settings)}), but answers are greedy; allowed: do_sample=false")
        limit = settings["max_gen_toks"]
        if limit >= self.max_length:
            raise ValueError(
                f"a task asks for answers of {limit} tokens (max_gen_toks), which leaves no room for a context within "
                f"max_length={self.max_length}; allowed: a larger max_length, or less: --gen_kwargs "
                f"max_gen_toks={self.max_length // 2}"
            )
        prompt = tuple(self.tok_encode(context)[limit - self.max_length :])
        return Request(prompt, layers, limit, give_up=partial(_has_ended, self.model.slm, settings["until"]))

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
    if text == _UNPRUNED:
        return ()
    parts = text.split("+")
    if not all(part.isdigit() and int(part) < num_layers for part in parts):
        raise ValueError(
            f"layers={text} are no layers; allowed: {_UNPRUNED}, or numbers from 0 to {num_layers - 1}, such as 3+7"
        )
    return tuple(sorted({int(part) for part in parts}))


def _has_ended(slm: SLM, stops: Sequence[str], said: tuple[int, ...]) -> bool:
    text = slm.decode(said)
    return any(stop in text for stop in stops)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
