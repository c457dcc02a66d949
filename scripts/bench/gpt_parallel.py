"""A plain PyTorch loop over several processes: DDP, or with --sharded FSDP2. To be launched by torchrun.

The net, optimizer, clipping and samples that `bigmodel fit` has with `hardware/ddp.yaml` and `hardware/fsdp.yaml`, and
nothing else. Every process reads the batch of the whole step and takes its share of it. Prints the loss every 10 steps.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.common import BF16, SIZES, TEXT, VOCAB_SIZE, Clock, arguments
from bigmodel.nn import GPT
from bigmodel.tasks.language_modeling import Characters, ContiguousSplit, TextData


def shard(net: GPT) -> nn.Module:
    """Each block by itself, then the rest; gathered in the type that computes, reduced in float32."""
    precision = MixedPrecisionPolicy(torch.bfloat16 if BF16 else torch.float32, torch.float32)
    for block in net.blocks:
        fully_shard(block, mp_policy=precision)
    return fully_shard(net, mp_policy=precision)


def main() -> None:
    options = arguments(__doc__)
    size = SIZES[options.size]
    distributed.init_process_group("gloo")
    rank, share = distributed.get_rank(), size.batch_size // distributed.get_world_size()
    data = TextData(
        str(TEXT),
        Characters(),
        ContiguousSplit(val=0.1),
        size.context_length,
        size.batch_size,
        cache_dir=".bench/cache",
    )
    if rank == 0:
        data.prepare_data()
    distributed.barrier()
    data.setup()

    torch.manual_seed(0)
    net: nn.Module = GPT(VOCAB_SIZE, size.context_length, width=size.width, depth=size.depth, num_heads=size.num_heads)
    if options.sharded:
        net = shard(net)
    else:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    clock = Clock(options.steps, options.warmup)
    mine = slice(rank * share, (rank + 1) * share)
    for step, batch in zip(range(options.steps), data.train_dataloader(), strict=False):
        with contextlib.nullcontext() if options.sharded else torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            logits = net(batch.tokens[mine])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets[mine].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and rank == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        clock.tick()
    if rank == 0:
        clock.report(size.tokens_per_step)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
