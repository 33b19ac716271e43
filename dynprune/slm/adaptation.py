"""Task-tuning an SLM: LoRA on tool-calling queries, the loss on the answer's tokens only.

The shipped delta ``smollm2_135m_fc`` was made by this module; its card says how.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from dynprune.atomic import replacing
from dynprune.data.augmentation import Source, family, stated_values, swap_values, vary_tools
from dynprune.data.datamodule import ResumableLoader
from dynprune.data.prompts import render_answer, render_prompt
from dynprune.data.tasks import Query
from dynprune.data.templates import Toolbox, source_of
from dynprune.slm.attention import added_mask
from dynprune.slm.likelihood import IGNORED
from dynprune.slm.loading import SLM

_FUNCTIONS = "functions.json"
DELTA_FILES = ("adapter_config.json", "adapter_model.safetensors", _FUNCTIONS)
"""Of a delta's folder, what can change a result; its card cannot."""
_WIDTH_STEP = 64


@dataclass(frozen=True)
class TokenisedAnswer:
    """One training sample: prompt, answer and end token, and how many of the last tokens are the answer's."""

    ids: list[int]
    num_answer_tokens: int


_Item = TypeVar("_Item")
TokenisedFamily = list[TokenisedAnswer]
"""Samples whose prompts begin alike."""


class AnswerData(lightning.LightningDataModule):
    """Queries with their reference answers, varied anew in each epoch (`dynprune.data.augmentation`), and more from templates.

    They come in families, queries with the same tools: what these have in common passes through the SLM once. A family is made
    of a query, which is asked with other values, or of a set of templates, and with some probability of two of these joined.
    Few queries of the benchmark need several calls or a choice between tools, and a small SLM does not learn either from
    these alone. What an epoch holds is drawn from the seed and the epoch's number, so that a training that goes on
    after a kill sees what it would have seen.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        toolboxes: Sequence[Toolbox],
        tokenizer: PreTrainedTokenizerBase,
        template_share: float,
        swap: float,
        compose_share: float,
        num_families: int | None,
        family_size: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Binds the queries.

        Args:
            queries: What to train on.
            toolboxes: Templates to train on as well.
            tokenizer: The SLM's tokenizer.
            template_share: Share of an epoch's families that come from templates, in 0..1, 1 excluded; none without toolboxes.
            swap: Probability that a draw of a query has other values, 0..1; without them a family has it once.
            compose_share: Probability that a family is joined with another one, or asks for two things, 0..1.
            num_families: Families in an epoch; ``None`` for one of each query, and the templates' share beside these.
            family_size: Queries in a family, at most.
            batch_size: Families in a batch.
            seed: Seed of variations and order.
        """
        super().__init__()
        self._queries = queries
        self._toolboxes = toolboxes
        self._tokenizer = tokenizer
        share = template_share if toolboxes else 0.0
        self._num_families = round(len(queries) / (1 - share)) if num_families is None else num_families
        self._num_filled = round(self._num_families * share)
        self._swap = swap
        self._compose_share = compose_share
        self._family_size = family_size
        self._batch_size = batch_size
        self._seed = seed

    @property
    def families_in_epoch(self) -> int:
        """How many families an epoch has."""
        return self._num_families

    def families(self, epoch: int) -> list[TokenisedFamily]:
        """The samples of one epoch: families of queries and those from templates."""
        rng = random.Random(f"{self._seed}-{epoch}")
        values = stated_values(self._queries)

        def of_query(query: Query) -> Source:
            return Source(
                vary_tools(query, rng).tools,
                lambda rng: swap_values(query, values, rng) if rng.random() < self._swap else query,
                tuple(message for message in query.messages if message["role"] == "system"),
            )

        origins: list[Query | Toolbox] = [
            *self._in_turn("queries", self._queries, epoch, self._num_families - self._num_filled),
            *self._in_turn("templates", self._toolboxes, epoch, self._num_filled),
        ]
        sources = [source_of(origin, rng) if isinstance(origin, Toolbox) else of_query(origin) for origin in origins]
        return _tokenised(
            [family(source, rng.choice(sources), self._family_size, self._compose_share, rng) for source in sources],
            self._tokenizer,
        )

    def _in_turn(self, name: str, items: Sequence[_Item], epoch: int, count: int) -> Iterator[_Item]:
        """An epoch's share of items: all of them come before one comes again, in another order each time."""
        order: list[int] = []
        for place in range(epoch * count, (epoch + 1) * count):
            if not order or place % len(items) == 0:
                order = list(range(len(items)))
                random.Random(f"{self._seed}-{name}-{place // len(items)}").shuffle(order)
            yield items[order[place % len(items)]]

    def train_dataloader(self) -> ResumableLoader:
        """The batches of the trainer's current epoch, of families of similar length where a batch has several."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        families = self.families(epoch)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        sampler: Sampler[int]
        if self._batch_size == 1:
            sampler = RandomSampler(families, generator=generator)
        else:
            lengths = [_num_tokens(samples) for samples in families]
            sampler = LengthGroupedSampler(self._batch_size, lengths=lengths, generator=generator)
        return ResumableLoader(
            families,  # type: ignore[arg-type]  # A list is a map-style data set.
            batch_size=self._batch_size,
            sampler=sampler,
            collate_fn=lambda chosen: collate_families(chosen, int(self._tokenizer.pad_token_id)),
        )


def _tokenised(families: Sequence[Sequence[Query]], tokenizer: PreTrainedTokenizerBase) -> list[TokenisedFamily]:
    def tokens(texts: list[str]) -> list[list[int]]:
        # Rendered text holds the special tokens already. All in one call: the tokenizer works on several at once.
        return cast(list[list[int]], tokenizer(texts, add_special_tokens=False).input_ids)

    queries = [query for members in families for query in members]
    prompts = tokens([render_prompt(tokenizer, query) for query in queries])
    answers = tokens([render_answer(query) for query in queries])
    samples = iter(
        TokenisedAnswer([*prompt, *answer, int(tokenizer.eos_token_id)], len(answer) + 1)
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    return [list(itertools.islice(samples, len(members))) for members in families]


def _num_shared(samples: TokenisedFamily) -> int:
    """How many tokens the prompts have in common, without a prompt's last token, which says the answer's first one."""
    columns = zip(*(sample.ids[: -sample.num_answer_tokens - 1] for sample in samples), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _num_tokens(samples: TokenisedFamily) -> int:
    """How many tokens of a family pass through the SLM."""
    shared = _num_shared(samples)
    return shared + sum(len(sample.ids) - shared for sample in samples)


def collate_families(families: Sequence[TokenisedFamily], pad_id: int) -> dict[str, Tensor]:
    """Makes a row of each family: what its samples have in common, then what follows in each, and padding.

    A token sees what its family has in common and what comes before it in its own sample, at its place in that sample: to the
    SLM each sample is as if it were alone.

    Args:
        families: B families.
        pad_id: The token that pads.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, all (B, T), and ``seen``, (B, 1, T, T), True where the token of a row
        sees that of a column. Only answers have labels.
    """
    # Few different widths: the CPU's matrix kernels are prepared anew for each shape, which takes longer than padding.
    width = -(-max(map(_num_tokens, families)) // _WIDTH_STEP) * _WIDTH_STEP
    ids_BT = torch.full((len(families), width), pad_id)
    positions_BT = torch.zeros_like(ids_BT)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    # 0 for what is common, the sample's number from 1 on, -1 for padding.
    parts_BT = torch.full_like(ids_BT, -1)
    for row, samples in enumerate(families):
        shared = end = _num_shared(samples)
        ids_BT[row, :shared] = torch.tensor(samples[0].ids[:shared])
        positions_BT[row, :shared] = torch.arange(shared)
        parts_BT[row, :shared] = 0
        for number, sample in enumerate(samples, start=1):
            start, end = end, end + len(sample.ids) - shared
            ids_BT[row, start:end] = torch.tensor(sample.ids[shared:])
            positions_BT[row, start:end] = torch.arange(shared, len(sample.ids))
            parts_BT[row, start:end] = number
            labels_BT[row, end - sample.num_answer_tokens : end] = torch.tensor(sample.ids[-sample.num_answer_tokens :])
    seen_BTT = (parts_BT[:, None] == 0) | (parts_BT[:, None] == parts_BT[:, :, None])
    return {
        "input_ids": ids_BT,
        "position_ids": positions_BT,
        "labels": labels_BT,
        # Padding sees padding: a row of a softmax must see something.
        "seen": seen_BTT.tril()[:, None],
    }


def new_delta(slm: SLM, rank: int, alpha: float, targets: Sequence[str] | str) -> PeftModel:
    """Wraps the SLM's linear layers with a LoRA delta that changes nothing yet.

    Args:
        slm: The SLM; its own weights stay as they are.
        rank: Rank of the delta of each linear layer.
        alpha: LoRA's scale is alpha / rank.
        targets: Names of the linear layers, or ``all-linear``.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft's annotation says int, its arithmetic is a division.
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    return cast(PeftModel, get_peft_model(slm.model, config))


class Adaptation(lightning.LightningModule):
    """LoRA training of an SLM on the answers of tool-calling queries."""

    def __init__(self, model: PeftModel, learning_rate: float, warmup_share: float, prune: Callable[[str, int], None]) -> None:
        """Binds the SLM.

        Args:
            model: The SLM with a delta to train, `new_delta` or one to go on from; its own weights stay as they are.
            learning_rate: Peak rate of AdamW.
            warmup_share: Share of the steps with a rising rate, in 0..1; it falls along a cosine after that.
            prune: Called before each batch with a text that names it and its number of rows: prunes layers of an SLM that
                learns to be pruned, or nothing.
        """
        super().__init__()
        self.slm = model
        self.learning_rate = learning_rate
        self.warmup_share = warmup_share
        self._prune = prune
        text_config = model.config.get_text_config()
        windows = (getattr(text_config, key, None) for key in ("sliding_window", "attention_chunk_size"))
        self._window = min((window for window in windows if window), default=None)
        # Checkpoints hold the delta alone, see `on_save_checkpoint`.
        self.strict_loading = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the answers' tokens in the batch, in nats a token.

        Raises:
            ValueError: If a sample is longer than what a layer of the SLM sees.
        """
        following_BT = batch["labels"].roll(-1, dims=1)
        longest = int(batch["position_ids"].max()) + 1
        if self._window is not None and longest > self._window:
            raise ValueError(
                f"a layer of the SLM sees the last {self._window} tokens of a text, but prompt and answer of a query have "
                f"{longest}, which this training does not do; allow shorter ones: data.source.max_chars=…, adapt.max_chars=null"
            )
        # A row of logits is as long as the vocabulary: only those columns in which some row of the batch has an answer.
        asked_K = (following_BT != IGNORED).any(dim=0).nonzero().flatten()
        self._prune(f"{self.current_epoch}-{batch_idx}", len(following_BT))
        # Autocast chooses the dtype of each product already: peft's own casts would double time and memory.
        with disable_input_dtype_casting(self.slm):
            logits_BKV = self.slm(
                input_ids=batch["input_ids"],
                # To be added to scores: that is what every kind of attention takes.
                attention_mask=added_mask(batch["seen"], self.slm.dtype),
                position_ids=batch["position_ids"],
                logits_to_keep=asked_K,
                use_cache=False,
            ).logits
        loss = functional.cross_entropy(
            logits_BKV.flatten(0, 1).float(), following_BT[:, asked_K].flatten(), ignore_index=IGNORED
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the SLM's own weights out of the checkpoint: they do not change."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW without weight decay, warm-up and cosine by step."""
        parameters = [p for p in self.slm.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule: LambdaLR = get_cosine_schedule_with_warmup(optimizer, int(steps * self.warmup_share), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def save_delta(model: PeftModel, folder: Path, functions: frozenset[str]) -> None:
    """Writes a LoRA delta in bfloat16, in peft's layout, and beside it the functions that it was trained on.

    Args:
        model: The trained model.
        folder: Where ``adapter_model.safetensors``, ``adapter_config.json`` and ``functions.json`` go.
        functions: The functions that it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.to(torch.bfloat16).contiguous() for key, value in get_peft_model_state_dict(model).items()}
    with replacing(folder / "adapter_model.safetensors") as path:
        save_file(state, path)
    config = model.peft_config["default"].to_dict()
    # Sets have no order: sorted, the same training gives the same file.
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = None
    with replacing(folder / "adapter_config.json") as path:
        path.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    with replacing(folder / _FUNCTIONS) as path:
        path.write_text(json.dumps(sorted(functions), indent=0) + "\n", encoding="utf-8")


def trained_functions(folder: Path) -> frozenset[str]:
    """The functions that a delta was trained on; none where its folder does not say."""
    path = folder / _FUNCTIONS
    return frozenset(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else frozenset()
