"""Kept outputs: the same files whoever computes them, gone on with when interrupted, refused where they cannot be right."""

import fcntl
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import forked
import outputs as launched
import pytest
import torch
from outputs import FIELDS, Noisy, Sample, frozen, say
from torch import nn

from bigmodel.data import output_cache as module
from bigmodel.data.output_cache import FieldSpec, OutputCache, weights_digest
from bigmodel.data.sampling import eval_loader, sequential_loader, train_loader

NET = frozen()


def store(folder, views=1, num_samples=10, fields=FIELDS, **key):
    return OutputCache(folder, {"net": "frozen", **key}, num_samples, fields, views)


def batches(view=0, n=10, rows=4):
    return sequential_loader(train_loader(Noisy(n), batch_size=2), rows=rows, epoch=view)


def files(outputs):
    return {file.name: file.read_bytes() for file in outputs.path.iterdir()}


def test_each_sample_reads_what_the_net_said_of_it(tmp_path):
    outputs = store(tmp_path, views=3)
    assert outputs.num_bytes == 3 * 10 * (7 * 2 + 8)
    assert not outputs.complete
    outputs.compute(None, batches, lambda batch: say(NET, batch))
    assert outputs.complete
    assert set(files(outputs)) == {"checksums.json", "key.json", "logits.bin", "largest.bin"}
    again = store(tmp_path, views=3)  # another process
    index = torch.tensor([7, 0, 9, 7])
    for view in range(3):
        said = NET(Noisy().__getitems__(index.tolist(), epoch=view).values)
        kept = again.read(index, view)
        assert kept["logits"].dtype == torch.float16
        torch.testing.assert_close(kept["logits"].float(), said, atol=1e-3, rtol=1e-3)
        assert torch.equal(kept["largest"], said.argmax(1))
    again.compute(None, batches, lambda batch: pytest.fail("computed again"))


def test_far_more_is_read_than_stays_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RELEASE_READS", 3)
    outputs = store(tmp_path)
    outputs.compute(None, batches, lambda batch: say(NET, batch))
    first = outputs.read(torch.arange(10))["logits"]
    for _ in range(10):
        assert torch.equal(outputs.read(torch.arange(10))["logits"], first)


def test_order_batches_and_processes_change_no_bit(tmp_path):
    """Shuffled batches, and batches of fewer processes or more, hold the same samples each, so the same bits."""
    alone = launched.fit(tmp_path / "one")
    forked.run(launched.__file__, tmp_path / "two")
    two = OutputCache(tmp_path / "two", {"net": "frozen"}, 10, FIELDS, 2)
    assert files(two) == files(alone)
    assert not list((tmp_path / "two").glob(".*"))

    shuffled = OutputCache(tmp_path / "shuffled", {"net": "frozen"}, 10, FIELDS, 2)
    shuffled.compute(None, lambda view: list(batches(view, rows=3))[::-1], lambda batch: say(NET, batch))
    assert files(shuffled) == files(alone)


def test_each_node_takes_all_samples_in_the_same_batches():
    loader = train_loader(Noisy(), batch_size=2)
    alone = [batch.index.tolist() for batch in sequential_loader(loader, rows=3)]
    assert alone == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 0]]
    assert [batch.weight.tolist() for batch in sequential_loader(loader, rows=3)][-1] == [1, 0, 0]
    parts = [sequential_loader(loader, rows=3, trainer=SimpleNamespace(local_rank=r, num_devices=2)) for r in (0, 1)]
    dealt = [batch.index.tolist() for pair in zip(*parts, strict=True) for batch in pair]
    assert dealt == alone
    first = next(iter(sequential_loader(loader, rows=3, epoch=5)))
    assert torch.equal(first.values, Noisy().__getitems__([0, 1, 2], 5).values)
    with pytest.raises(ValueError, match=r"the samples of a DataLoader have no order .*train_loader"):
        sequential_loader(torch.utils.data.DataLoader(Noisy()), rows=3)
    assert len(sequential_loader(eval_loader(Noisy(), batch_size=4), rows=10)) == 1


def test_an_interrupted_computation_goes_on(tmp_path):
    seen = []

    def until_third(batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch.index.tolist())
        return say(NET, batch)

    outputs = store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        outputs.compute(None, batches, until_third)
    assert not outputs.complete
    with pytest.raises(ValueError, match="is missing or incomplete"):
        outputs.read(torch.tensor([0]))
    rest = []

    def go_on(batch):
        rest.append(batch.index.tolist())
        return say(NET, batch)

    outputs.compute(None, batches, go_on)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rest == [[8, 9, 0, 0]]
    straight = store(tmp_path / "straight")
    straight.compute(None, batches, lambda batch: say(NET, batch))
    assert files(outputs) == files(straight)


def test_another_run_may_end_the_work_first(tmp_path):
    """Both fill the same files: whoever ends second finds them in place."""
    first, second = store(tmp_path), store(tmp_path)
    started = []

    def meanwhile(batch):
        if not started:
            started.append(True)
            second.compute(None, batches, lambda batch: say(NET, batch))
        return say(NET, batch)

    first.compute(None, batches, meanwhile)
    assert first.complete
    assert not list(tmp_path.glob(".*"))
    torch.testing.assert_close(first.read(torch.arange(10)), second.read(torch.arange(10)))


def test_a_store_is_of_one_key_alone_and_says_what_differs(tmp_path):
    outputs = store(tmp_path, teacher="a", data="x")
    wanted = {"net": "frozen", "teacher": "c", "data": "x"}
    assert OutputCache.others(tmp_path, wanted, 10) == []
    outputs.compute(None, batches, lambda batch: say(NET, batch))
    store(tmp_path, teacher="b", data="y").compute(None, batches, lambda batch: say(NET, batch))
    assert store(tmp_path, data="x", teacher="a").complete, "the order of the entries is none"
    assert not store(tmp_path, teacher="c", data="x").complete
    nearest, farther = OutputCache.others(tmp_path, wanted, 10)
    assert (nearest.path, nearest.differences) == (outputs.path, {"teacher": ("c", "a")})
    assert farther.differences == {"teacher": ("c", "b"), "data": ("x", "y")}
    assert OutputCache.others(tmp_path, wanted, 9)[0].differences["samples"] == (9, 10)
    half = {**FIELDS, "logits": FieldSpec((7,), torch.float32)}
    assert not store(tmp_path, fields=half, teacher="a", data="x").complete
    (outputs.path / "logits.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"logits.bin is damaged: 0 bytes, not 140. Delete "):
        store(tmp_path, teacher="a", data="x").read(torch.tensor([0]))


def test_what_cannot_be_kept_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"are missing \(samples 8, 9\)"):
        store(tmp_path).compute(None, lambda view: batches(n=8), lambda batch: say(NET, batch))
    with pytest.raises(ValueError, match=r"a number outside 0 to 9 \(samples 8, 9, 10, 11\)"):
        store(tmp_path).compute(None, lambda view: batches(n=12), lambda batch: say(NET, batch))
    with pytest.raises(ValueError, match="a sample occurs twice"):
        store(tmp_path).compute(None, lambda view: [*batches(), *batches()], lambda batch: say(NET, batch))

    def of(values, **kind):
        sample = Sample(torch.zeros(1, 64), torch.tensor([0]), torch.ones(1))
        field = {"logits": FieldSpec((2,), torch.float16)}
        store(tmp_path, num_samples=1, fields=field, **kind).compute(
            None, lambda view: [sample], lambda batch: {"logits": torch.tensor([values])}
        )

    with pytest.raises(ValueError, match=r"logits of 1 samples has shape \[1, 3\], not \[1, 2\]"):
        of([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"reaches 70,000, too large for float16: store it as float32"):
        of([70000.0, 1.0])
    with pytest.raises(ValueError, match="is not finite"):
        of([float("nan"), 1.0])
    with pytest.raises(ValueError, match="is not finite"):
        of([torch.inf, 1.0])
    of([-torch.inf, 1.0])  # the score of what must not be chosen

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    large = OutputCache(tmp_path, {"net": "large"}, 10**6, FIELDS, 2, "teacher logits", "set --data.batch_size to less")
    needed = (
        r"teacher logits of 1,000,000 samples in 2 views take 46.0 MB, and .* has 1.0 MB left: set --data.batch_size"
    )
    with pytest.raises(ValueError, match=needed):
        large.compute(None, batches, lambda batch: say(NET, batch))
    store(tmp_path, net="small").check_space()
    with pytest.raises(ValueError, match=r"has 1.0 MB left: set \$BIGMODEL_CACHE"):
        store(tmp_path, net="small").check_space(beside=10**6)
    assert not [path for path in tmp_path.iterdir() if re.search(large.path.name, path.name)]
    (Path(tmp_path) / "file").write_text("")
    with pytest.raises(ValueError, match=r"outputs cannot be stored in .*: set \$BIGMODEL_CACHE"):
        store(tmp_path / "file").compute(None, batches, lambda batch: say(NET, batch))


def test_a_folder_that_is_only_read(tmp_path, monkeypatch):
    kept = store(tmp_path)
    kept.compute(None, batches, lambda batch: say(NET, batch))
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    monkeypatch.setattr(module.os, "open", lambda *args: pytest.fail("written"))
    kept.check_space()
    assert store(tmp_path).read(torch.arange(2))["logits"].shape == (2, 7)
    with pytest.raises(ValueError, match=r"outputs cannot be stored in .*no permission to write\): set \$BIGMODEL"):
        store(tmp_path, net="another").check_space()


def test_a_disk_that_cannot_allocate(tmp_path, monkeypatch):
    """There, zeros are written instead, for which the file must be open for reading too, and not for appending."""

    def allocate(file, start, size):
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDWR
        assert not flags & os.O_APPEND
        os.pwrite(file, bytes(size), start)

    monkeypatch.setattr(module.os, "posix_fallocate", allocate)
    seen = []

    def until_second(batch):
        if seen:
            raise KeyboardInterrupt
        seen.append(True)
        return say(NET, batch)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path).compute(None, batches, until_second)
    outputs = store(tmp_path)
    outputs.compute(None, batches, lambda batch: say(NET, batch))
    assert (outputs.read(torch.arange(4))["logits"] != 0).any(), "what was there is not written over"


def test_weights_are_told_apart():
    digests = {weights_digest(frozen())}
    changed = frozen()
    with torch.no_grad():
        changed[0].weight[0, 0] += 1e-6
    digests |= {weights_digest(changed), weights_digest(frozen().bfloat16()), weights_digest(frozen()[0])}
    statistics = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    statistics[0].running_mean += 1
    digests |= {weights_digest(norm) for norm in statistics}
    assert len(digests) == 6
    assert weights_digest(frozen()) == weights_digest(frozen().eval()) in digests
