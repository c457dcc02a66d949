"""litgpt's model of the same sizes in a Fabric loop. Runs in an environment of its own, see run.py.

litgpt has rotary positions only; norm, MLP, biases and the order of the blocks' parts are set as in the other ways.
"""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bench.common import PRECISION, SIZES, TOKENS, VOCAB_SIZE, Clock, arguments


def main() -> None:
    options = arguments(__doc__)
    size, clock = SIZES[options.size], Clock(options.steps, options.warmup)
    config = Config(
        block_size=size.context_length, n_layer=size.depth, n_head=size.num_heads, n_embd=size.width,
        vocab_size=VOCAB_SIZE, padded_vocab_size=VOCAB_SIZE, bias=False, parallel_residual=False,
    )  # fmt: skip
    tokens, length = torch.from_numpy(np.load(TOKENS).astype(np.int64)), size.context_length + 1
    windows = TensorDataset(tokens[: len(tokens) // length * length].view(-1, length))
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=PRECISION)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(windows, size.batch_size, shuffle=True, drop_last=True))
    for step, (batch,) in zip(range(options.steps), loader, strict=False):
        logits = model(batch[:, :-1])
        loss = chunked_cross_entropy(logits, batch[:, 1:], chunk_size=0)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            fabric.print(f"step {step} loss {loss.item():.4f}")
        clock.tick()
    clock.report(size.tokens_per_step)


if __name__ == "__main__":
    main()
