"""Choice of a layout for a GPT on a number of GPUs: memory, communication and speed by arithmetic. Nothing here is measured.

    python scripts/layout.py            # the table of scripts/README.md: 1 B, 7 B and 70 B parameters on 8, 64 and 512 GPUs
    python scripts/layout.py --gpus 32 --depth 32 --width 4096 --num_heads 32 --mlp_width 11008    # your own

It goes through all layouts that `bigmodel fit` offers and takes the fastest that fits. Formulas and assumptions are in
scripts/README.md. Bytes are counted in powers of 1000.

B sequences at once on a group of t GPUs that share each matrix, T tokens, D width, F hidden channels of the MLP, V
vocabulary, L blocks, P parameters.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

WEIGHTS, GRADIENTS, ADAM, HALF = 4, 4, 8, 2  # bytes a parameter: float32 masters, float32, two moments; bfloat16
UPDATE = 40  # bytes a parameter that an optimizer step moves: norm (4), scaling (8), AdamW (28)
LOSS_CHUNK = 2048  # tokens whose logits are in memory at once
SLACK = 0.05  # a simpler layout is taken if it is slower by no more than this: the arithmetic is no finer
CHECKPOINTED = {0.0: "no", 0.25: "every 4th block", 0.5: "every 2nd block", 1.0: "all blocks"}


class Net(NamedTuple):
    """A GPT, by the arguments of `bigmodel.nn.GPT`."""

    depth: int
    width: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    vocab_size: int
    gated: bool = True  # swiglu
    tied_head: bool = False
    rotary: bool = True

    @property
    def block(self) -> int:
        """Parameters of a block; norms and biases, below a thousandth, are left out."""
        kv = self.width * self.num_kv_heads // self.num_heads
        return self.width * (2 * self.width + 2 * kv) + (3 if self.gated else 2) * self.width * self.mlp_width

    @property
    def root(self) -> int:
        """Parameters outside of the blocks: embedding and head."""
        return self.vocab_size * self.width * (1 if self.tied_head else 2)

    @property
    def parameters(self) -> int:
        """All of them, P."""
        return self.depth * self.block + self.root

    def flops(self, context_length: int) -> float:
        """FLOPs of a token, forward and backward: 6 N + 12 L D T, N without an embedding that is only looked up."""
        matrices = self.depth * self.block + self.vocab_size * self.width
        return 6 * matrices + 12 * self.depth * self.width * context_length

    def activation(self) -> float:
        """Bytes of a token that a block keeps for its backward pass: Korthikanti et al. 2022 (arXiv 2205.05198), section 4,
        in bfloat16, without dropout, and without the attention weights, which a fused attention does not keep."""
        kv = self.num_kv_heads / self.num_heads
        norms, attention = 4, 2 + 2 + 4 * kv + 2  # inputs of two norms; of q, k, v; q; k and v; of the projection
        if self.rotary:
            attention += 2 + 2 * kv  # q and k once more: before their rotation they lie in one tensor with v
        mlp = 2 + (8 if self.gated else 4) * self.mlp_width / self.width  # input; what lies between its matrices
        return self.width * (norms + attention + mlp)


class Machine(NamedTuple):
    """Hardware. Rates are in bytes per second each way; the defaults are the data sheets' of an H100 (SXM)."""

    gpus: int
    gpus_per_node: int = 8
    memory: float = 80e9
    usable: float = 0.9  # of memory; the rest is the driver's, NCCL's, and lost between allocations
    flops: float = 989e12  # bfloat16, dense
    mfu: float = 0.4  # of that, while nothing waits for communication
    nvlink: float = 450e9
    network: float = 50e9  # of each GPU
    links: float = 0.8  # what collectives reach of these rates
    hbm: float = 3.35e12  # of its own memory
    felt: float = 0.12  # of hidden communication: its kernels take some 16 of 132 multiprocessors while they run
    hop: float = 5e-6  # seconds from one GPU to the next in a ring

    def gather(self, size: float, n: int, per_node: int) -> float:
        """Seconds of an all-gather to `size` bytes, or of a reduce-scatter from them, over n GPUs, so many of a node. A node
        takes in each byte once, over all of its links, and passes it on by NVLink meanwhile."""
        if n == 1:
            return 0.0
        per_node = min(n, per_node)
        nodes = n // per_node
        inside = (per_node > 1) * (n - 1) / n * size / self.nvlink
        outside = (nodes - 1) / nodes * size / (per_node * self.network)
        return max(inside, outside) / self.links + (n - 1) * self.hop

    def all_reduce(self, size: float, n: int, per_node: int) -> float:
        """Seconds of an all-reduce of `size` bytes: twice the bytes of a gather, in a tree's number of hops."""
        bandwidth = self.gather(size, n, per_node) - (n - 1) * self.hop
        return 2 * (bandwidth + math.ceil(math.log2(n)) * self.hop)


class Layout(NamedTuple):
    """How a step is spread out. DDP: as many replicas as GPUs."""

    replicas: int
    shards: int
    tensor: int
    micro_batch: int  # sequences at once on each group of `tensor` GPUs
    accumulation: int
    checkpointed: float  # share of the blocks that are computed again
    reduce_each: bool  # gradients after each micro-batch

    @property
    def is_ddp(self) -> bool:
        """Whole copies, one on each GPU."""
        return self.replicas > 1 and self.shards == self.tensor == 1

    @property
    def kind(self) -> tuple[int, bool, int]:
        """What sets it apart from other kinds; the simpler is the smaller: DDP, sharded, in replicas, tensor parallel."""
        return self.tensor, self.shards > 1, self.replicas

    def name(self) -> str:
        """For people."""
        if self.is_ddp:
            return "DDP"
        parts = [f"FSDP over {self.shards}"] if self.shards > 1 else []
        parts += [f"{self.replicas} replicas"] if self.replicas > 1 else []
        parts += [f"tensor {self.tensor}"] if self.tensor > 1 else []
        return ", ".join(parts) or "1 GPU"

    def flags(self) -> str:
        """Flags of the layout."""
        hardware = "ddp" if self.is_ddp else "tensor_parallel" if self.tensor > 1 else "fsdp"
        words = [f"-c experiments/hardware/{hardware}.yaml"] if self.replicas * self.shards * self.tensor > 1 else []
        if not self.is_ddp and self.replicas > 1:
            words.append(f"--trainer.strategy.num_replicas {self.replicas}")
        if self.tensor > 1:
            words.append(f"--trainer.strategy.tensor_parallel_size {self.tensor}")
        if self.reduce_each:
            words.append("--trainer.strategy.reduce_each_micro_batch true")
        words += [f"--data.micro_batch_size {self.micro_batch}", f"--model.loss_chunk_size {LOSS_CHUNK}"]
        if self.checkpointed:
            words.append("--callbacks.activation_checkpointing bigmodel.parallel.ActivationCheckpointing")
        if 0 < self.checkpointed < 1:
            words.append(f"--callbacks.activation_checkpointing.every {round(1 / self.checkpointed)}")
        return " ".join(words)


class Estimate(NamedTuple):
    """Requirements of a layout: bytes on a GPU (state, activations, gathered parameters), seconds of a step, tokens/s."""

    layout: Layout
    state: float
    activations: float
    gathered: float
    compute: float
    communication: float
    exposed: float
    tokens_per_second: float

    @property
    def memory(self) -> float:
        """Bytes on a GPU."""
        return self.state + self.activations + self.gathered


def layouts(net: Net, machine: Machine, batch_size: int) -> Iterator[Layout]:
    """All that divide the batch."""
    per_node, nodes = machine.gpus_per_node, max(1, machine.gpus // machine.gpus_per_node)
    for tensor in (1, 2, 4, 8):
        data = machine.gpus // tensor
        if machine.gpus % tensor or net.num_kv_heads % tensor or tensor > per_node:
            continue
        choices = [(data, 1)] * (tensor == 1) + [(1, data)] + [(nodes, data // nodes)] * (nodes > 1)
        for replicas, shards in dict.fromkeys(choices):
            for checkpointed in CHECKPOINTED:
                for micro in (2**i for i in range(8)):
                    accumulation, rest = divmod(batch_size, micro * data)
                    if rest or not accumulation:
                        continue
                    for each in (False, True)[: 2 if accumulation > 1 and shards > 1 else 1]:
                        yield Layout(replicas, shards, tensor, micro, accumulation, checkpointed, each)


def estimate(net: Net, machine: Machine, layout: Layout, context_length: int) -> Estimate:
    """Memory and time of a layout; see the formulas in scripts/README.md."""
    replicas, shards, t, micro, accumulation, checkpointed, reduce_each = layout
    P, tokens = net.parameters, micro * context_length
    state = (WEIGHTS + GRADIENTS + ADAM) * P / (shards * t)
    if shards == 1:
        gathered = HALF * P / t  # autocast's copies
    else:  # two blocks and the rest in bfloat16; gradients of one block and the rest, in bfloat16 and float32
        gathered = (HALF * (2 * net.block + net.root) + (HALF + GRADIENTS) * (net.block + net.root)) / t
        if accumulation > 1 and not reduce_each:
            gathered += GRADIENTS * P / t
    full = net.activation() * tokens / t
    kept = (1 - checkpointed) * full + checkpointed * 2 * net.width * tokens / t
    logits = min(tokens, LOSS_CHUNK) * net.vocab_size * (2 + 4 + 4) / t  # bfloat16, float32, its gradient
    activations = net.depth * kept + (full if checkpointed else 0) + 6 * net.width * tokens / t + logits

    one = tokens * net.flops(context_length) / t / (machine.mfu * machine.flops)
    compute = accumulation * one * (1 + checkpointed / 3) + UPDATE * P / (shards * t) / machine.hbm
    per_node = max(1, machine.gpus_per_node // t)
    units = [net.block] * net.depth + [net.root]
    gathers = reduces = between = 0.0
    inside = min(per_node, shards)  # of a group of shards, GPUs in one node
    if shards > 1:
        gathers = sum(2 * machine.gather(HALF * unit / t, shards, inside) for unit in units)
        reduces = sum(machine.gather(GRADIENTS * unit / t, shards, inside) for unit in units)
    if replicas > 1:
        share = max(1, per_node // shards)  # of a group of replicas, GPUs in one node
        between = sum(machine.all_reduce(GRADIENTS * unit / t / shards, replicas, share) for unit in units)
    num_reduces = accumulation if reduce_each else 1
    hidden = accumulation * gathers + num_reduces * (reduces + between)
    # All-reduces of activations are waited for: two forward, two backward, and two when a block is computed again.
    waited = 0.0
    if t > 1:
        once = machine.all_reduce(HALF * tokens * net.width, t, t)
        waited = accumulation * net.depth * once * (4 + 2 * checkpointed)
    # What can be hidden lies beside computation: all of it for gathers, the backward pass for gradients, where it takes some
    # of the multiprocessors. The first unit that is gathered and the last that is reduced have nothing beside them.
    share = 1.0 if shards > 1 else 2 / 3
    ends = (gathers / 2 + reduces + between) / len(units)
    beside = min(hidden, share * compute)
    exposed = hidden - beside + machine.felt * beside + ends + waited
    total = layout.micro_batch * accumulation * replicas * shards * context_length / (compute + exposed)
    return Estimate(layout, state, activations, gathered, compute, hidden + waited, exposed, total)


def best(net: Net, machine: Machine, batch_size: int, context_length: int) -> list[Estimate]:
    """Layouts that fit, the one to take in front: of those that are the fastest, but for the slack, the simplest; of these
    the one that communicates least, in the largest micro-batches. Then the fastest of each other kind."""
    every = [estimate(net, machine, layout, context_length) for layout in layouts(net, machine, batch_size)]
    fitting = [one for one in every if one.memory <= machine.usable * machine.memory]
    fastest = max((one.tokens_per_second for one in fitting), default=0.0)
    kinds: dict[tuple[int, bool, int], list[Estimate]] = {}
    for one in fitting:
        kinds.setdefault(one.layout.kind, []).append(one)

    def pick(kind: list[Estimate]) -> Estimate:
        fast = (1 - SLACK) * max(one.tokens_per_second for one in kind)
        fast_enough = [one for one in kind if one.tokens_per_second >= fast]
        return min(fast_enough, key=lambda one: (round(one.communication, 3), -one.layout.micro_batch))

    picked = sorted((pick(kind) for kind in kinds.values()), key=lambda one: -one.tokens_per_second)
    near = [one for one in picked if one.tokens_per_second >= (1 - SLACK) * fastest] or picked[:1]
    first = min(near, key=lambda one: one.layout.kind, default=None)
    return [first, *(one for one in picked if one is not first)] if first is not None else []


HEAD = (
    "layout", "micro-batch x accumulation", "checkpointed", "GB a GPU: state + activations + gathered", "compute, s",
    "communication, s (exposed)", "tokens/s", "tokens/s a GPU",
)  # fmt: skip


def cells(one: Estimate, gpus: int) -> list[str]:
    """A line of the table."""
    layout, giga = one.layout, 1e9
    name = layout.name() + (", reduced each micro-batch" if layout.reduce_each else "")
    return [
        name,
        f"{layout.micro_batch} x {layout.accumulation}",
        CHECKPOINTED[layout.checkpointed],
        f"{one.memory / giga:.0f}: {one.state / giga:.0f} + {one.activations / giga:.0f} + {one.gathered / giga:.0f}",
        f"{one.compute:.2f}",
        f"{one.communication:.2f} ({one.exposed:.2f})",
        f"{one.tokens_per_second:,.0f}",
        f"{one.tokens_per_second / gpus:,.0f}",
    ]


# Of the shapes of Llama 3.2 1B, Llama 2 7B and Llama 2 70B.
NETS = {
    "1 B": Net(16, 2048, 32, 8, 8192, 128_256, tied_head=True),
    "7 B": Net(32, 4096, 32, 32, 11008, 32_000),
    "70 B": Net(80, 8192, 64, 8, 28672, 32_000),
}
GPUS = (8, 64, 512)
CONTEXT_LENGTH, BATCH_SIZE = 4096, 1024  # tokens; sequences per optimizer step: 4.2 M tokens


def table() -> str:
    """The table of scripts/README.md."""
    lines = [["parameters", "GPUs", *HEAD], ["---"] * (len(HEAD) + 2)]
    for name, net in NETS.items():
        for gpus in GPUS:
            found = best(net, Machine(gpus), BATCH_SIZE, CONTEXT_LENGTH)
            row = cells(found[0], gpus) if found else [f"does not fit; {least(net)}", *["-"] * (len(HEAD) - 1)]
            lines.append([name, str(gpus), *row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def least(net: Net) -> str:
    """From how many GPUs on it fits."""
    powers = (2**i for i in range(3, 15))
    gpus = next((n for n in powers if best(net, Machine(n), BATCH_SIZE, CONTEXT_LENGTH)), None)
    return f"it does on {gpus}" if gpus else "nor on 16,384"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one, where = parser.add_argument_group("the net"), parser.add_argument_group("the machine")
    one.add_argument("--depth", type=int, help="blocks")
    one.add_argument("--width", type=int, help="channels of a token")
    one.add_argument("--num_heads", type=int)
    one.add_argument("--num_kv_heads", type=int, help="default: num_heads")
    one.add_argument("--mlp_width", type=int, help="default: 4 x width")
    one.add_argument("--vocab_size", type=int, default=32_000)
    one.add_argument("--gelu", action="store_true", help="an MLP of two matrices, not swiglu's three")
    one.add_argument("--learned_positions", action="store_true", help="not rotary ones")
    one.add_argument("--tied_head", action="store_true")
    one.add_argument("--context_length", type=int, default=CONTEXT_LENGTH, help="tokens")
    one.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="sequences per optimizer step, over all GPUs")
    defaults = Machine._field_defaults
    where.add_argument("--gpus", type=int, default=8)
    where.add_argument("--gpus_per_node", type=int, default=defaults["gpus_per_node"])
    where.add_argument("--memory", type=float, default=defaults["memory"], help="bytes of a GPU")
    where.add_argument("--usable", type=float, default=defaults["usable"], help="share of it")
    where.add_argument("--flops", type=float, default=defaults["flops"], help="bf16, dense, per second")
    where.add_argument("--mfu", type=float, default=defaults["mfu"], help="while nothing waits for communication")
    where.add_argument("--nvlink", type=float, default=defaults["nvlink"], help="bytes/s each way, of a GPU")
    where.add_argument("--network", type=float, default=defaults["network"], help="bytes/s each way, for each GPU")
    where.add_argument("--links", type=float, default=defaults["links"], help="what collectives reach of these")
    where.add_argument("--hbm", type=float, default=defaults["hbm"], help="bytes/s of a GPU's memory")
    where.add_argument(
        "--felt", type=float, default=defaults["felt"], help="share of hidden communication that is felt"
    )
    where.add_argument("--hop", type=float, default=defaults["hop"], help="seconds, from GPU to GPU in a ring")
    given = parser.parse_args()
    if given.depth is None:
        print(table())
        return
    if given.width is None or given.num_heads is None:
        parser.error("--depth needs --width and --num_heads beside it")
    if given.gpus > given.gpus_per_node and given.gpus % given.gpus_per_node:
        parser.error(f"--gpus {given.gpus} is not a whole number of nodes of --gpus_per_node {given.gpus_per_node}")
    net = Net(
        given.depth, given.width, given.num_heads, given.num_kv_heads or given.num_heads,
        given.mlp_width or 4 * given.width, given.vocab_size, not given.gelu, given.tied_head,
        not given.learned_positions,
    )  # fmt: skip
    machine = Machine(given.gpus, **{name: getattr(given, name) for name in defaults})
    found = best(net, machine, given.batch_size, given.context_length)
    print(
        f"{net.parameters / 1e9:.2f} B parameters, {given.batch_size * given.context_length:,} tokens a step; arithmetic:"
    )
    if not found:
        raise SystemExit("no layout fits: more GPUs, a batch that they divide, or --trainer.strategy.cpu_offload true")
    rows = [HEAD, *(cells(estimate, given.gpus) for estimate in found[:5])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nbigmodel fit -c EXPERIMENT.yaml {found[0].layout.flags()}")


if __name__ == "__main__":
    main()
