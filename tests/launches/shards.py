"""Sharded checkpoints of four processes: `python shards.py RUN` in an empty folder. Run by test_shards.py.

They are forked, so that torch is imported once. RUN is the directory of a finished run: its checkpoints become folders.
"""

import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bigmodel.checkpoint import AtomicCheckpointIO, read, shards
from bigmodel.checkpoint.parts import map_tree
from bigmodel.checkpoint.sharded import LazyShardedTensor, distribute_like
from bigmodel.cli.formatting import find_differences

NUM_PROCESSES = 4


def make_tree(row, square):
    """Return the content of a checkpoint: plain values, plain tensors, and DTensors of all layouts."""
    torch.manual_seed(0)

    def made(*shape, on=row, layout=None, dtype=torch.float32):
        return distribute_tensor(torch.randn(shape).to(dtype), on, layout or [Shard(0)])

    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))
    parallelize_module(net, square["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(net, mesh=square["dp"])  # 7 rows over 2 x 2: strided and uneven
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():  # tensor parallelism of uneven sizes has no forward pass
        parameter.grad = parameter.detach().cos()
    optimizer.step()
    tied = made(6, 4)
    overlapping = DTensor.from_local(tied.to_local().t(), row, [Shard(1)], shape=(4, 6), stride=(1, 4))
    return {
        "state_dict": net.state_dict() | {"tied": tied, "also tied": tied.detach(), "transposed": overlapping},
        "optimizer_states": [optimizer.state_dict()],
        "layouts": (
            made(8, 3),
            made(3, 8, layout=[Shard(1)]),
            made(5, 2, dtype=torch.bfloat16),  # 2, 2, 1, and nothing
            made(2, 3),
            made(0, 3),
            made(layout=[Replicate()]),
            made(3, 3, layout=[Replicate()], dtype=torch.int64),
            made(5, 6, on=square, layout=[Shard(0), Shard(1)]),
            made(5, 6, on=square, layout=[Shard(1), Replicate()]),
            made(7, 2, on=square, layout=[Replicate(), Shard(0)]),
            made(9, on=square, layout=[Shard(0), Shard(0)]),
        ),
        "plain": {"step": 3, 0: torch.arange(3), "name": "x", "nothing": None, "pair": (1, [2.5])},
    }


def change(tree, function):
    return map_tree(tree, lambda _, leaf: function(leaf) if isinstance(leaf, DTensor) else leaf)


def places_right(content, tree, row, square):
    """Compare tensors distributed over each mesh after reading, bitwise."""
    layouts = [(row, [Shard(0)]), (row, [Shard(1)]), (square, [Shard(1), Shard(0)]), (square, [Shard(0), Replicate()])]

    def compare(keys, leaf):
        saved = tree
        for key in keys:
            saved = saved[key]
        if not isinstance(saved, DTensor):
            return
        whole = saved.full_tensor()
        for mesh, layout in layouts if saved.ndim == 2 else []:
            placed = distribute_like(leaf, distribute_tensor(torch.zeros(saved.shape), mesh, layout))
            assert placed.placements == tuple(layout)
            assert torch.equal(placed.full_tensor(), whole), (keys, layout)
        again = distribute_like(leaf, saved)
        assert again.placements == saved.placements
        assert again.dtype == saved.dtype
        assert torch.equal(again.to_local(), saved.to_local()), keys
        assert torch.equal(distribute_like(leaf, torch.zeros(saved.shape)), whole)

    map_tree(content, compare)


def to_folders(run, row):
    """Replace each checkpoint of a run by one that four processes have saved."""
    for path in sorted(Path(run, "checkpoints").glob("*.ckpt")):
        content = read(path)

        def shard(keys, leaf):
            sharded = isinstance(leaf, torch.Tensor) and leaf.ndim and "torchmetrics" not in str(keys)
            return distribute_tensor(leaf, row, [Shard(0)]) if sharded else leaf

        AtomicCheckpointIO().save_checkpoint(map_tree(content, shard), path)


def expect_failure(tree, path, rank):
    """Return the error message of a failing save."""
    try:
        AtomicCheckpointIO().save_checkpoint(tree, path)
    except Exception as error:
        Path(f"{path}.said.{rank}").write_text(f"{type(error).__name__}: {error}")


def work(rank, run):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{os.getcwd()}/meet", rank=rank, world_size=NUM_PROCESSES,
        timeout=timedelta(seconds=200),
    )  # fmt: skip
    row = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tree = make_tree(row, square)
    whole = change(tree, lambda leaf: leaf.full_tensor())
    if rank == 0:
        torch.save(whole, "expected.pt")
        AtomicCheckpointIO().save_checkpoint(whole, "file.ckpt")

    AtomicCheckpointIO().save_checkpoint(tree, "at-once.ckpt")
    before = change(tree, lambda leaf: leaf.clone())
    thread = AtomicCheckpointIO(asynchronous=True)
    thread.save_checkpoint(tree, "by-thread.ckpt")
    with torch.no_grad():
        change(tree, lambda leaf: leaf.to_local().zero_())  # training goes on
    thread.teardown()
    distributed.barrier()
    tree = before

    content = AtomicCheckpointIO().load_checkpoint("at-once.ckpt", whole=False)
    assert isinstance(content["state_dict"]["0.weight"], LazyShardedTensor)
    assert find_differences(tree, content) == []
    assert find_differences(change(tree, lambda leaf: leaf + (rank == 3)), content) or rank < 3
    places_right(content, tree, row, square)
    places_right(AtomicCheckpointIO().load_checkpoint("file.ckpt"), tree, row, square)
    to_folders(run, row)

    save_file = safetensors.torch.save_file

    def full(tensors, path, metadata):
        if rank == 2:
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    def killed(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    AtomicCheckpointIO().save_checkpoint(tree, "last-1.ckpt")
    safetensors.torch.save_file = full
    expect_failure(tree, "full.ckpt", rank)
    safetensors.torch.save_file = save_file
    expect_failure({**tree, "odd": row_of_other_sizes(row, rank)}, "odd.ckpt", rank)
    shards._TIMEOUT = 1.5
    safetensors.torch.save_file = killed
    change(tree, lambda leaf: leaf.to_local().zero_())
    expect_failure(tree, "last-1.ckpt", rank)  # in place of one that is there
    Path(f"done.{rank}").touch()
    os._exit(0)  # one is dead: no farewell


def row_of_other_sizes(row, rank):
    """Return a DTensor whose shard on the last process is smaller than its layout requires."""
    local = torch.zeros(2 if rank < 3 else 1, 3)
    return DTensor.from_local(local, row, [Shard(0)], shape=(8, 3), stride=(3, 1))


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank, sys.argv[1])) for rank in range(NUM_PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit([worker.exitcode for worker in workers] != [0, 0, -signal.SIGKILL, 0])
