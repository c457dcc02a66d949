"""Sharded checkpoints: what four processes wrote is read back bitwise, whole or in part, onto any mesh or none; a process
that dies costs no earlier checkpoint; and damage is found and named."""

import filecmp
import itertools
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import shards
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import bigmodel
from bigmodel.checkpoint import AtomicCheckpointIO, distribute_like, find_checkpoint, find_damage, read
from bigmodel.checkpoint.parts import local_part
from bigmodel.cli import main
from bigmodel.cli.formatting import find_differences

EXPERIMENT = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope="module")
def launched(tmp_path_factory, table):
    """The folder in which four processes saved; in it `run` and `sharded`, the same run with files and with folders."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        main(["fit", "-c", EXPERIMENT, "--data.path", str(table), "--trainer.accelerator", "cpu"])
        (record,) = folder.glob("runs/*/*/run.json")
        shutil.copytree(record.parent, folder / "run")
        shutil.copytree(record.parent, folder / "sharded")
        launch = [sys.executable, shards.__file__, str(folder / "sharded")]
        result = forked.call(launch)
        assert result.returncode == 0, result.stdout + result.stderr
        yield folder


@pytest.fixture
def checkpoint(launched, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(launched / "at-once.ckpt", tmp_path / "checkpoints" / "last-7.ckpt"))


def test_the_part_of_fsdp_over_tensor_parallel_is_what_fsdp_gives():
    def chunk(index, num_parts, which):
        parts = index.chunk(num_parts)
        return parts[which] if which < len(parts) else index[:0]

    for rows, dp, tp, *at in itertools.product(range(14), range(1, 5), range(2, 4), range(4), range(3)):
        if at[0] >= dp or at[1] >= tp:
            continue
        held = chunk(chunk(torch.arange(rows), tp, at[1]), dp, at[0])
        tensor = SimpleNamespace(
            device_mesh=SimpleNamespace(shape=(2, dp, tp), get_coordinate=lambda at=at: [1, *at]), ndim=2,
            placements=(Replicate(), _StridedShard(0, split_factor=tp), Shard(0)), shape=(rows, 3),
            to_local=lambda held=held: torch.empty(len(held), 3),
        )  # fmt: skip
        offsets, sizes = local_part(tensor)
        assert sizes == [len(held), 3]
        assert not len(held) or offsets == [int(held[0]), 0]
        tensor.placements = (Replicate(), _StridedShard(0, split_factor=tp), Replicate())  # not contiguous
        with pytest.raises(ValueError, match="not a layout of contiguous parts"):
            local_part(tensor)


def test_what_four_processes_wrote_is_read_by_one(launched):
    expected = torch.load(launched / "expected.pt", weights_only=True)
    content = read(launched / "at-once.ckpt")
    assert find_differences(content, expected) == []
    assert type(content["state_dict"]) is type(expected["state_dict"])
    weights = content["state_dict"]
    assert weights["tied"].data_ptr() == weights["also tied"].data_ptr()
    assert list(weights) == list(expected["state_dict"])


def test_a_thread_writes_the_same_files(launched):
    at_once, by_thread = launched / "at-once.ckpt", launched / "by-thread.ckpt"
    files = [f"shard-{rank}-of-4.safetensors" for rank in range(4)]
    assert names(at_once) == names(by_thread) == ["manifest.json", *files, "state.ckpt"]
    assert filecmp.cmpfiles(at_once, by_thread, names(at_once), shallow=False)[0] == names(at_once)


def test_each_number_is_stored_once(launched):
    expected = torch.load(launched / "expected.pt", weights_only=True)
    sharded = json.loads((launched / "at-once.ckpt" / "manifest.json").read_text())["tensors"]
    found = {name for name in sharded if name.startswith("state_dict/")}
    assert found == {f"state_dict/{name}" for name in expected["state_dict"] if name != "also tied"}
    for tensor in sharded.values():
        covered = torch.zeros(tensor["shape"], dtype=torch.int64)
        for _, offsets, sizes in tensor["parts"]:
            covered[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] += 1
        assert (covered == 1).all()


def test_any_region_is_read(launched):
    expected = torch.load(launched / "expected.pt", weights_only=True)
    content = read(launched / "at-once.ckpt", whole=False)
    draw = random.Random(0)
    for leaf, whole in zip(content["layouts"], expected["layouts"], strict=True):
        for _ in range(20):
            ends = [sorted(draw.choices(range(n + 1), k=2)) for n in whole.shape]
            part = leaf.part([a for a, _ in ends], [b - a for a, b in ends])
            assert torch.equal(part, whole[tuple(slice(a, b) for a, b in ends)])
    with pytest.raises(ValueError, match=r"shape \[8, 3\] cannot be placed as one of \[3, 8\]"):
        distribute_like(content["layouts"][0], torch.zeros(3, 8))


# What goes wrong


def test_a_process_that_fails_is_named_and_nothing_is_left(launched):
    said = {path.name: path.read_text() for path in launched.glob("*.said.*")}
    assert said["full.ckpt.said.0"].startswith("OSError: process 2 could not write full.ckpt: [Errno 28] no space to")
    assert said["full.ckpt.said.2"].startswith("OSError: [Errno 28] no space to write the checkpoint")
    assert said["odd.ckpt.said.0"] == (
        "OSError: process 3 could not write odd.ckpt: odd: a process holds [1, 3] of [8, 3], and should hold [2, 3]"
    )
    assert said["odd.ckpt.said.3"].startswith("ValueError: odd: a process holds [1, 3]")
    assert said["last-1.ckpt.said.0"].startswith("TimeoutError: last-1.ckpt is not complete")
    assert re.search(r"the parts of processes (1, )?2(, 3)? are missing", said["last-1.ckpt.said.0"])
    assert sorted(launched.glob("done.*")) == [launched / f"done.{rank}" for rank in (0, 1, 3)]


def test_the_checkpoint_that_was_to_be_replaced_is_whole(launched):
    assert find_damage(launched / "last-1.ckpt") is None
    assert (
        find_differences(read(launched / "last-1.ckpt"), torch.load(launched / "expected.pt", weights_only=True)) == []
    )
    assert not [*launched.glob("full.ckpt"), *launched.glob("odd.ckpt"), *launched.glob(".last-1.*")]


@pytest.mark.parametrize(
    "name", ["state.ckpt", "shard-0-of-4.safetensors", "shard-3-of-4.safetensors", "manifest.json"]
)
def test_damage_is_found_and_named(launched, checkpoint, name):
    assert find_damage(checkpoint) is None
    path = checkpoint / name
    content = path.read_bytes()
    moments = itertools.count()

    def write(changed):
        path.write_bytes(changed)
        os.utime(path, ns=(0, next(moments)))  # the clock of files is coarse: else it might look unchanged

    for position in range(0, len(content), 1 + len(content) // 40):
        write(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert find_damage(checkpoint).startswith(f"{name} has changed since it was written"), position
    write(content[:-1])
    assert find_damage(checkpoint).startswith(name)
    with pytest.raises(ValueError, match=f"last-7.ckpt cannot be read as a checkpoint: {name}"):
        AtomicCheckpointIO().load_checkpoint(checkpoint)
    path.unlink()
    assert find_damage(checkpoint) == f"{name} is missing"
    write(content)
    assert find_damage(checkpoint) is None


def test_a_damaged_one_is_passed_over(launched, checkpoint, capsys):
    earlier = shutil.copytree(checkpoint, checkpoint.with_name("last-5.ckpt"))
    path = checkpoint / "shard-1-of-4.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    assert find_checkpoint(checkpoint.parents[1], "last") == earlier
    said = capsys.readouterr().err
    assert f"{checkpoint} is damaged (shard-1-of-4.safetensors has changed since it was written" in said
    assert "last-5.ckpt is used instead; optimizer steps lost: 2" in said
    with pytest.raises(ValueError, match=r"last-7.ckpt cannot be read as a checkpoint: shard-1-of-4"):
        find_checkpoint(checkpoint.parents[1], "last-7")


def test_a_file_replaces_a_folder_and_a_removal_leaves_nothing(checkpoint):
    writer = AtomicCheckpointIO()
    other = shutil.copytree(checkpoint, checkpoint.with_name("last-8.ckpt"))
    writer.save_checkpoint({"step": 7}, checkpoint)
    assert read(checkpoint) == {"step": 7}
    writer.remove_checkpoint(other)
    assert names(checkpoint.parent) == ["last-7.ckpt"]


# A run


def test_a_sharded_run_goes_on_unsharded(launched, monkeypatch, capsys):
    monkeypatch.chdir(launched)
    run, sharded = launched / "run", launched / "sharded"
    assert all(path.is_dir() for path in sharded.glob("checkpoints/*"))
    for which in ("best", "last"):
        assert (
            find_differences(bigmodel.load(run, which).state_dict(), bigmodel.load(sharded, which).state_dict()) == []
        )
    for directory in (run, sharded):
        main(["validate", str(directory)])
        main(["export", str(directory), "--output", str(directory / "net.safetensors")])
    figures = [json.loads((directory / "validate.json").read_text())["val/mse"] for directory in (run, sharded)]
    assert figures[0] == figures[1]
    assert find_differences(*(load_file(directory / "net.safetensors") for directory in (run, sharded))) == []

    killed = shutil.copytree(
        sharded / "checkpoints" / "last-10.ckpt", sharded / "checkpoints" / ".last-9.ckpt.0.partial"
    )
    for directory in (run, sharded):
        main(["fit", "--resume", str(directory), "--trainer.max_steps", "13", "--trainer.max_epochs", "null"])
    assert "(resumed at step 10)" in capsys.readouterr().out
    assert not killed.exists()
    assert names(run / "checkpoints") == names(sharded / "checkpoints")
    last = [read(directory / "checkpoints" / "last-13.ckpt") for directory in (run, sharded)]
    assert find_differences(last[0]["state_dict"], last[1]["state_dict"]) == []
    assert find_differences(last[0]["optimizer_states"], last[1]["optimizer_states"]) == []
    assert (run / "metrics.csv").read_text().splitlines()[0] == (sharded / "metrics.csv").read_text().splitlines()[0]
