"""Task-tuning an SLM: LoRA on tool-calling queries, the loss on the answer's tokens only.

The shipped delta ``smollm2_135m_fc`` was made by this module through ``dynprune stage=adapt model=smollm2_135m``.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from dynprune.atomic import replacing
from dynprune.data.augmentation import compose, stated_values, swap_values, vary_tools
from dynprune.data.datamodule import ResumableLoader
from dynprune.data.prompts import render_answer, render_prompt
from dynprune.data.tasks import Query
from dynprune.data.templates import Toolbox, fill
from dynprune.slm.likelihood import IGNORED
from dynprune.slm.loading import SLM
from dynprune.slm.padding import left_padded

_FUNCTIONS = "functions.json"
DELTA_FILES = ("adapter_config.json", "adapter_model.safetensors", _FUNCTIONS)
"""Of a delta's folder, what can change a result; its card cannot."""
_WIDTH_STEP = 64


@dataclass(frozen=True)
class TokenisedAnswer:
    """One training sample: prompt, answer and end token, and how many of the last tokens are the answer's."""

    ids: list[int]
    num_answer_tokens: int


class AnswerData(lightning.LightningDataModule):
    """Queries with their reference answers, varied anew in each epoch (`dynprune.data.augmentation`), and more from templates.

    With some probability a query states other values, or gets another one's tools beside its own, or is joined with it, or
    with itself with other values.
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
        batch_size: int,
        seed: int,
    ) -> None:
        """Binds the queries.

        Args:
            queries: What to train on.
            toolboxes: Templates to train on as well.
            tokenizer: The SLM's tokenizer.
            template_share: Share of an epoch's samples that come from templates, in 0..1, 1 excluded; none without toolboxes.
            swap: Probability that a query's values are swapped, 0..1.
            compose_share: Probability that a query gets another one's tools, or is joined with it, 0..1.
            batch_size: Samples in a batch.
            seed: Seed of variations and order.
        """
        super().__init__()
        self._queries = queries
        self._templates = [(toolbox, index) for toolbox in toolboxes for index in range(len(toolbox.queries))]
        self._tokenizer = tokenizer
        self._num_filled = round(len(queries) * template_share / (1 - template_share)) if toolboxes else 0
        self._swap = swap
        self._compose_share = compose_share
        self._batch_size = batch_size
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    @property
    def samples_in_epoch(self) -> int:
        """How many samples an epoch has."""
        return len(self._queries) + self._num_filled

    def samples(self, epoch: int) -> list[TokenisedAnswer]:
        """The samples of one epoch: one for each query, and those from templates."""
        rng = random.Random(f"{self._seed}-{epoch}")
        values = stated_values(self._queries)
        varied = [
            vary_tools(swap_values(query, values, rng) if rng.random() < self._swap else query, rng) for query in self._queries
        ]
        varied += [fill(*self._template(epoch, position), f"template-{position}", rng) for position in range(self._num_filled)]
        composed = [compose(query, varied, values, rng) if rng.random() < self._compose_share else query for query in varied]
        return _tokenised(composed, self._tokenizer)

    def _template(self, epoch: int, position: int) -> tuple[Toolbox, int]:
        """Goes through all templates before one comes again, in another order each time."""
        passes, place = divmod(epoch * self._num_filled + position, len(self._templates))
        if passes not in self._orders:
            order = list(range(len(self._templates)))
            random.Random(f"{self._seed}-templates-{passes}").shuffle(order)
            self._orders[passes] = order
        return self._templates[self._orders[passes][place]]

    def train_dataloader(self) -> ResumableLoader:
        """The batches of the trainer's current epoch: left-padded, of samples of similar length."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        samples = self.samples(epoch)
        sampler = LengthGroupedSampler(
            self._batch_size,
            lengths=[len(sample.ids) for sample in samples],
            generator=torch.Generator().manual_seed(self._seed + epoch),
        )
        return ResumableLoader(
            samples,  # type: ignore[arg-type]  # A list is a map-style data set.
            batch_size=self._batch_size,
            sampler=sampler,
            collate_fn=lambda chosen: collate_answers(chosen, int(self._tokenizer.pad_token_id)),
        )


def _tokenised(queries: Sequence[Query], tokenizer: PreTrainedTokenizerBase) -> list[TokenisedAnswer]:
    def tokens(texts: list[str]) -> list[list[int]]:
        # Rendered text holds the special tokens already. All in one call: the tokenizer works on several at once.
        return cast(list[list[int]], tokenizer(texts, add_special_tokens=False).input_ids)

    prompts = tokens([render_prompt(tokenizer, query) for query in queries])
    answers = tokens([render_answer(query) for query in queries])
    return [
        TokenisedAnswer([*prompt, *answer, int(tokenizer.eos_token_id)], len(answer) + 1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def collate_answers(samples: Sequence[TokenisedAnswer], pad_id: int) -> dict[str, Tensor]:
    """Pads samples on the left; prompts have no label.

    Args:
        samples: B samples.
        pad_id: The token that pads.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` and ``labels``, all (B, T).
    """
    # Few different widths: the CPU's matrix kernels are prepared anew for each shape, which takes longer than padding.
    width = -(-max(len(sample.ids) for sample in samples) // _WIDTH_STEP) * _WIDTH_STEP
    labels = [[IGNORED] * (width - s.num_answer_tokens) + s.ids[-s.num_answer_tokens :] for s in samples]
    return {
        **left_padded([sample.ids for sample in samples], pad_id, torch.device("cpu"), width),
        "labels": torch.tensor(labels),
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
            prune: Called before each batch with a text that names it and its number of samples: prunes layers of an SLM that
                learns to be pruned, or nothing.
        """
        super().__init__()
        self.slm = model
        self.learning_rate = learning_rate
        self.warmup_share = warmup_share
        self._prune = prune
        # Checkpoints hold the delta alone, see `on_save_checkpoint`.
        self.strict_loading = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens, in nats a token."""
        labels_BT = batch["labels"]
        keep = int((labels_BT != IGNORED).sum(dim=1).max()) + 1
        self._prune(f"{self.current_epoch}-{batch_idx}", len(labels_BT))
        # Autocast chooses the dtype of each product already: peft's own casts would double time and memory.
        with disable_input_dtype_casting(self.slm):
            logits_BTV = self.slm(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
                logits_to_keep=keep,
                use_cache=False,
            ).logits
        loss = functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(),
            labels_BT[:, -keep + 1 :].flatten(),
            ignore_index=IGNORED,
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
