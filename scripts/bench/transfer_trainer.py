"""Hugging Face's Trainer with the same encoder, head and texts, batches of similar length, and its defaults otherwise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from bench.common import BENCH, BF16, Clock, arguments
from bench.trainer import train
from bigmodel.tasks.transfer_learning import LabelledTextData
from bigmodel.tasks.transfer_learning.backbones.bundled import folder_of

MAX_LENGTH, BATCH_SIZE = 64, 32


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a head; returns the loss in the form that Trainer requires."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder_of("{minilm}"))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(self.encoder.config.hidden_size, 2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = self.encoder(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        logits = self.head((features * mask).sum(1) / mask.sum(1))  # [B, T, D] -> [B, D] -> [B, K]
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class Reviews(Dataset):
    """Texts prepared by bigmodel, as lists of tokens."""

    def __init__(self) -> None:
        data = LabelledTextData(
            "{fine_foods}", tokenizer=folder_of("{minilm}"), max_length=MAX_LENGTH, cache_dir=str(BENCH / "cache")
        )
        data.prepare_data()
        data.setup()
        self.rows = [
            (tokens[mask].tolist(), int(target))
            for batch in data.train_dataloader()
            for tokens, mask, target in zip(batch.tokens, batch.mask, batch.targets, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens, label = self.rows[i]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": label}


def main() -> None:
    options = arguments(__doc__)
    clock = Clock(options.steps, options.warmup)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder_of("{minilm}"))
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    train(
        Classifier(), Reviews(), clock, BATCH_SIZE, collator, bf16=BF16, save_strategy="no",
        optim="adamw_torch_fused", learning_rate=1e-4, weight_decay=0.01, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    clock.report(BATCH_SIZE)


if __name__ == "__main__":
    main()
