"""Task-tuning an SLM: LoRA on tool-calling queries, the loss on the answer's tokens only.

The shipped delta ``smollm2_135m_fc`` was made by this module through ``dynprune stage=adapt model=smollm2_135m``.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from dynprune.atomic import replacing
from dynprune.data.prompts import render_answer, render_prompt
from dynprune.data.tasks import Query
from dynprune.slm.loading import SLM

IGNORED = -100


@dataclass(frozen=True)
class TokenisedAnswer:
    """One training sample: prompt, answer and end token, and how many of the last tokens are the answer's."""

    ids: list[int]
    num_answer_tokens: int


class AnswerData(Dataset[TokenisedAnswer]):
    """Queries with their reference answers, some of them composed of two.

    Two queries that each call one function are joined, with some probability, into one query that asks for both: their
    words and their calls one after the other, their tools together. Few queries of the benchmark need several calls, and
    a small SLM does not learn the form from these alone.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        tokenizer: PreTrainedTokenizerBase,
        compose: float,
        epochs: int,
        seed: int,
    ) -> None:
        """Renders and tokenises the samples of all epochs, each epoch with new compositions."""
        rng = random.Random(seed)
        rendered = [
            query
            for _ in range(epochs)
            for query in (_composed(query, queries, rng) if rng.random() < compose else query for query in queries)
        ]
        self.samples = [_tokenised(query, tokenizer) for query in rendered]

    def __len__(self) -> int:
        """Number of samples over all epochs."""
        return len(self.samples)

    def __getitem__(self, index: int) -> TokenisedAnswer:
        """The sample at a position."""
        return self.samples[index]


def _composed(query: Query, others: Sequence[Query], rng: random.Random) -> Query:
    other = rng.choice(others)
    names = {tool["name"] for tool in query.tools}
    short = len(query.tools) + len(other.tools) <= 4 and len(query.answers) + len(other.answers) <= 4
    if not short or any(tool["name"] in names for tool in other.tools):
        return query
    tools = [*query.tools, *other.tools]
    rng.shuffle(tools)
    first, second = (" ".join(m["content"] for m in q.messages if m["role"] == "user") for q in (query, other))
    link = rng.choice((" Also, ", " Then, ", " And ", " "))
    system = [m for q in (query, other) for m in q.messages if m["role"] == "system"]
    return Query(
        id=f"{query.id}+{other.id}",
        category="parallel_multiple",
        messages=(*system, {"role": "user", "content": first + link + second}),
        tools=tuple(tools),
        answers=query.answers + other.answers,
        allowed=query.allowed + other.allowed,
    )


def _tokenised(query: Query, tokenizer: PreTrainedTokenizerBase) -> TokenisedAnswer:
    prompt = tokenizer(render_prompt(tokenizer, query), add_special_tokens=False).input_ids
    answer = tokenizer(render_answer(query), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return TokenisedAnswer(prompt + answer, len(answer))


def answer_batches(data: AnswerData, pad_id: int, batch_size: int, seed: int) -> DataLoader[dict[str, Tensor]]:
    """Loads left-padded batches of samples of similar length, in an order that the seed fixes."""

    def collate(samples: list[TokenisedAnswer]) -> dict[str, Tensor]:
        width = max(len(sample.ids) for sample in samples)
        padded = [[pad_id] * (width - len(s.ids)) + s.ids for s in samples]
        mask = [[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in samples]
        labels = [[IGNORED] * (width - s.num_answer_tokens) + s.ids[-s.num_answer_tokens :] for s in samples]
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }

    sampler = LengthGroupedSampler(
        batch_size,
        lengths=[len(sample.ids) for sample in data.samples],
        generator=torch.Generator().manual_seed(seed),
    )
    return DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=collate)


class Adaptation(lightning.LightningModule):
    """LoRA training of an SLM on the answers of tool-calling queries."""

    def __init__(
        self,
        slm: SLM,
        rank: int,
        alpha: float,
        targets: Sequence[str] | str,
        learning_rate: float,
        warmup_share: float,
    ) -> None:
        """Wraps the SLM's linear layers with LoRA.

        Args:
            slm: The SLM; its own weights stay as they are.
            rank: Rank of the delta of each linear layer.
            alpha: LoRA's scale is alpha / rank.
            targets: Names of the linear layers, or ``all-linear``.
            learning_rate: Peak rate of AdamW.
            warmup_share: Share of the steps with a rising rate, in 0..1; it falls along a cosine after that.
        """
        super().__init__()
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft's annotation says int, its arithmetic is a division.
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        self.slm: PeftModel = get_peft_model(slm.model, config)  # type: ignore[assignment]
        self.learning_rate = learning_rate
        self.warmup_share = warmup_share

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens, in nats a token."""
        labels_BT = batch["labels"]
        keep = int((labels_BT != IGNORED).sum(dim=1).max()) + 1
        logits_BTV = self.slm(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        loss = functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, -keep + 1 :].flatten(), ignore_index=IGNORED
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, object]]]:
        """AdamW without weight decay, warm-up and cosine by step."""
        parameters = [p for p in self.slm.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule: LambdaLR = get_cosine_schedule_with_warmup(optimizer, int(steps * self.warmup_share), steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def save_delta(model: PeftModel, folder: Path) -> None:
    """Writes a LoRA delta in bfloat16, in peft's layout.

    Args:
        model: The trained model.
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
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


