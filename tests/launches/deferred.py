"""Nets created without memory, then sharded over four processes and initialized: `python forked.py 4 deferred.py`.

Run by parallel/test_deferred.py in an empty folder.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bigmodel.nn import GPT
from bigmodel.parallel import deferred


class Net(nn.Module):
    """A GPT with odd sizes, a parameter drawn before a module takes it, copied weights, and buffers."""

    def __init__(self, tied_head: bool) -> None:
        super().__init__()
        self.gpt = GPT(
            51,
            8,
            width=24,
            depth=2,
            num_heads=4,
            mlp_width=36,
            bias=True,
            tied_head=tied_head,
            norm="rms",
            qk_norm=True,
        )
        self.drawn = nn.Parameter(torch.randn(5, 3))
        self.copied = nn.Linear(24, 7)
        self.copied.load_state_dict({"weight": torch.rand(7, 24), "bias": torch.arange(7.0)})
        self.norm = nn.BatchNorm1d(7)
        self.register_buffer("numbers", torch.rand(3))
        nn.init.trunc_normal_(self.gpt.blocks[0].mlp.up.weight)

    def forward(self, tokens):
        return self.norm(self.copied(self.gpt.features(tokens)[:, 0])).sum() + self.drawn.sum() + self.gpt(tokens).sum()


def sharded(net: Net, tensor_parallel: int) -> None:
    mesh = init_device_mesh("cpu", (4 // tensor_parallel, tensor_parallel), mesh_dim_names=("data", "tensor"))
    plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in net.gpt.blocks:
        if tensor_parallel > 1:
            parallelize_module(block, mesh["tensor"], plan, src_data_rank=None)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])


def check(tensor_parallel: int, tied_head: bool) -> None:
    torch.manual_seed(7)
    whole = Net(tied_head)
    torch.manual_seed(7)
    with deferred() as log:
        net = Net(tied_head)
    if not tied_head:
        net.gpt.to(torch.bfloat16)
        whole.gpt.to(torch.bfloat16)
    sharded(net, tensor_parallel)
    log.materialize(net, "cpu")
    if tied_head:  # FSDP2 takes up the new memory: the net computes
        net(torch.arange(16).view(2, 8)).backward()
    expected = whole.state_dict()
    for name, tensor in net.state_dict().items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            assert name != "gpt.blocks.1.mlp.up.weight" or tensor.to_local().numel() == 36 * 24 // 4
            tensor = tensor.full_tensor()
        else:
            assert "norm" in name or name == "numbers", f"{name} is not sharded"
        if "norm.running" in name or "num_batches" in name:
            continue  # the batch that was computed
        assert torch.equal(tensor, expected[name]), (tensor_parallel, tied_head, name)
        assert tensor.dtype == expected[name].dtype


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for tensor_parallel in (1, 2):
        for tied_head in (True, False):
            check(tensor_parallel, tied_head)
    dist.barrier()
    dist.destroy_process_group()
