"""A plain PyTorch loop: the net, data, batches, optimizer and clipping that `bigmodel fit` has, and nothing else.

Prints the loss every 10 steps. Reads the text that bigmodel prepared through bigmodel's data set and loader.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.common import BF16, SIZES, TEXT, VOCAB_SIZE, Clock, arguments, report
from bigmodel.nn import GPT
from bigmodel.tasks.language_modeling import Characters, ContiguousSplit, TextData


def main() -> None:
    options = arguments(__doc__)
    size = SIZES[options.size]
    data = TextData(
        str(TEXT),
        Characters(),
        ContiguousSplit(val=0.1),
        size.context_length,
        size.batch_size,
        cache_dir=".bench/cache",
    )
    data.prepare_data()
    data.setup()
    assert data.sizes["vocab_size"] == VOCAB_SIZE

    torch.manual_seed(0)
    net = GPT(VOCAB_SIZE, size.context_length, width=size.width, depth=size.depth, num_heads=size.num_heads)
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    clock, losses = Clock(options.steps, options.warmup), []
    for step, batch in zip(range(options.steps), data.train_dataloader(), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16 and not options.losses):
            logits = net(batch.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        if options.losses:
            losses.append(loss.item())
        else:
            clock.tick()
    if options.losses:
        report(losses)
    else:
        clock.report(size.tokens_per_step)


if __name__ == "__main__":
    main()
