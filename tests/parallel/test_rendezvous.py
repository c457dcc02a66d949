"""What is wrong with a launch is said in time and by name. Threads stand for processes, but for one launch of two."""

import re
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from torch import distributed
from two_processes import experiment

from bigmodel.cli import main
from bigmodel.parallel import rendezvous

ALIKE = {"torch": "2.13.0", "--data.batch_size": "12"}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def meet(facts, world_size, seconds=200.0):
    """What each process of a meeting says: None for all is well."""
    port = free_port()

    def one(rank):
        try:
            return rendezvous.rendezvous(
                "127.0.0.1", port, rank, world_size, facts[rank], seconds=seconds, name="m"
            ), None
        except ValueError as error:
            return None, str(error)

    with ThreadPoolExecutor(len(facts)) as pool:  # stores are kept until all have their answer
        return [said for _, said in list(pool.map(one, range(len(facts))))]


def test_processes_that_are_alike_meet():
    assert meet([ALIKE] * 5, 5) == [None] * 5


def test_who_has_what_is_said_by_the_first():
    other = {**ALIKE, "torch": "2.12.1"}
    first, *others = meet([ALIKE, other, other, {**ALIKE, "--data.batch_size": "16"}], 4)
    assert others == [
        f"process {rank} stops because of an error in the launch: see the output of process 0" for rank in (1, 2, 3)
    ]
    assert "the 4 processes differ" in first
    table = [" ".join(line.split()) for line in first.splitlines()[1:]]
    node = re.escape(rendezvous.platform.node())
    for line, pattern in zip(
        table,
        [
            r"torch 2\.13\.0 ranks 0, 3 on",
            r"2\.12\.1 ranks 1-2 on",
            r"--data\.batch_size 12 ranks 0-2 on",
            "16 rank 3 on",
        ],
        strict=True,
    ):
        assert re.fullmatch(f"{pattern} {node}", line), line


def test_those_who_do_not_come_are_named():
    start = time.monotonic()
    first, other = meet([ALIKE] * 2, 5, seconds=4.0)
    assert time.monotonic() - start < 120, "not the half hour of PyTorch"
    assert first.startswith("3 of 5 processes have not registered at 127.0.0.1:")
    assert "within 4 s: missing ranks 2-4; registered ranks 0-1 on" in first
    assert "BIGMODEL_RENDEZVOUS_SECONDS" in first
    assert re.search("process 1 stops because|process 1 has lost the store", other)


def test_torch_does_not_name_the_missing():
    """The reason for a rendezvous of our own."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(distributed.DistStoreError) as caught:
        distributed.init_process_group("gloo", address, timedelta(seconds=1), world_size=3, rank=0)
    assert "1/3 clients joined" in str(caught.value)
    assert "rank" not in str(caught.value)


@pytest.mark.parametrize(("host", "why"), [("127.0.0.1", "refused"), ("no-such-host.invalid", "not known")])
def test_nobody_there(host, why):
    port, start = free_port(), time.monotonic()
    with pytest.raises(
        ValueError, match=rf"process 3 of 4 cannot reach process 0 at {host}:{port} .* within 0.5 s: .*{why}"
    ):
        rendezvous.rendezvous(host, port, 3, 4, ALIKE, seconds=0.5)
    assert time.monotonic() - start < 120


def test_something_else_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"process 0 cannot listen at 127.0.0.1:{port} .*address already"):
            rendezvous.rendezvous("127.0.0.1", port, 0, 2, ALIKE, seconds=5)
        with pytest.raises(
            ValueError, match=rf"process 1 cannot use the program that listens at 127.0.0.1:{port} .*does not answer"
        ):
            rendezvous.rendezvous("127.0.0.1", port, 1, 2, ALIKE, seconds=0.5)


def test_another_run_at_the_same_address():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        stores = list(
            pool.map(lambda rank: rendezvous.rendezvous("127.0.0.1", port, rank, 2, ALIKE, name="m"), range(2))
        )
    with pytest.raises(ValueError, match=rf"another process 1 .* at 127.0.0.1:{port}.*MASTER_PORT"):
        rendezvous.rendezvous("127.0.0.1", port, 1, 2, ALIKE, name="m")
    del stores


def test_a_time_limit_that_is_none(monkeypatch):
    monkeypatch.setenv("BIGMODEL_RENDEZVOUS_SECONDS", "soon")
    with pytest.raises(ValueError, match=r"BIGMODEL_RENDEZVOUS_SECONDS=soon: .* above 0"):
        rendezvous.rendezvous("127.0.0.1", 1, 1, 2, ALIKE)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, r"set --trainer.devices 4 --trainer.num_nodes 2"),
        (
            {"WORLD_SIZE": "4", "GROUP_RANK": "2"},
            r"process 1 of node 2, .* --trainer.devices 2 x --trainer.num_nodes 2 = 4",
        ),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "2"}, r"process 2 of node 0"),
        ({"WORLD_SIZE": "4", "NODE_RANK": "1"}, None),
    ],
)
def test_processes_are_as_many_as_the_trainer_counts_on(variables, message, monkeypatch):
    for name, value in {"LOCAL_RANK": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    trainer = SimpleNamespace(num_devices=2, num_nodes=2)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        rendezvous.check_world_size(trainer)


def test_long_tables_are_cut():
    facts = [{f"--model.a{i}": f"{rank}" * 100 for i in range(30)} for rank in range(2)]
    table = rendezvous.diff_ranks([{"rank": rank, "node": "n", **one} for rank, one in enumerate(facts)])
    assert len(table.splitlines()) == 21
    assert table.endswith("and 40 more lines")
    assert max(map(len, table.splitlines())) < 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.strategy", "fsdp"], r"--trainer.strategy fsdp: this is FSDP1.*-c experiments/hardware/fsdp.yaml"),
        (
            ["--trainer.strategy", "{class_path: lightning.pytorch.strategies.FSDPStrategy}"],
            "FSDPStrategy: this is FSDP1",
        ),
        (["--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp_spawn: .* set --trainer.strategy ddp,"),
        (["--trainer.strategy", "dpp"], r"created with .*--trainer.strategy dpp.*: .*invalid strategy name"),
        (["--trainer.accelerator", "tpu"], r"created with --trainer.accelerator tpu.*torch_xla"),
        (["--trainer.devices", "0"], r"created with --trainer.accelerator cpu --trainer.devices 0"),
    ],
)
def test_a_trainer_that_cannot_be_made(flags, message, table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *experiment(table, "runs"), *flags])
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def said(tmp_path_factory, table):
    """What two processes said to each attempt, by its name and the process."""
    folder = tmp_path_factory.mktemp("launch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        main(["fit", *experiment(table, "other", "--trainer.max_steps", "2")])
        (record,) = Path("other").glob("**/run.json")
        shutil.copytree(record.parent, "resumed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).parents[1] / "launches" / "launch.py"
    result = forked.call([*launcher, script, table, folder / "resumed"], cwd=folder)
    assert (folder / "done").exists(), result.stdout + result.stderr
    return {path.name: path.read_text() for path in folder.glob("*.[01]")} | {
        "printed": result.stdout,
        "folder": folder,
    }


def test_two_processes_are_told_what_is_wrong(said):
    for rank in "01":
        assert "2 processes (WORLD_SIZE), and --trainer.devices 1 x" in said[f"alone.{rank}"]
        assert "(each would train alone): set --trainer.devices 2 --trainer.num_nodes 1" in said[f"alone.{rank}"]
        assert "--trainer.devices 3 x --trainer.num_nodes 1 = 3" in said[f"three.{rank}"]
        assert "this is FSDP1" in said[f"sharded.{rank}"]
        assert "--data.batch_size 13 is not divisible by the 2 processes" in said[f"indivisible.{rank}"]
        assert "is of another architecture or vocabulary than this configuration describes" in said[f"other.{rank}"]
    assert re.search(r"--data.micro_batch_size +3 +rank 0 on .*\n +6 +rank 1 on", said["unlike.0"])
    assert "see the output of process 0" in said["unlike.1"]
    assert "1 of 2 processes have not registered" in said["missing.0"]
    assert "missing rank 1; registered rank 0 on" in said["missing.0"]


def test_nothing_is_left_by_what_was_refused(said):
    assert len(said["well.0"].splitlines()) == len(said["well.1"].splitlines()) == 1, "it says nothing"
    assert len(list((said["folder"] / "runs").glob("**/run.json"))) == 1, "that of the launch that went well"
    assert len(list((said["folder"] / "resumed").glob("checkpoints/*.ckpt"))) > 0
