"""Hugging Face's Trainer with a GPT-2 of the same sizes, no dropout, and all else at its defaults."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from bench.common import BF16, SIZES, TOKENS, VOCAB_SIZE, Clock, arguments
from bench.trainer import train


class Windows(Dataset):
    """The text in windows of T tokens; the model shifts the labels itself."""

    def __init__(self, context_length: int) -> None:
        self.tokens, self.context_length = np.load(TOKENS, mmap_mode="r"), context_length

    def __len__(self) -> int:
        return len(self.tokens) // self.context_length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start = i * self.context_length
        window = torch.from_numpy(self.tokens[start : start + self.context_length].astype(np.int64))
        return {"input_ids": window, "labels": window}


def main() -> None:
    options = arguments(__doc__)
    size, clock = SIZES[options.size], Clock(options.steps, options.warmup)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=size.context_length, n_embd=size.width, n_layer=size.depth,
        n_head=size.num_heads, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    train(
        GPT2LMHeadModel(config), Windows(size.context_length), clock, size.batch_size, bf16=BF16,
        optim="adamw_torch_fused", learning_rate=1e-3, adam_beta2=0.95, weight_decay=0.1,
    )  # fmt: skip
    clock.report(size.tokens_per_step)


if __name__ == "__main__":
    main()
