"""The data module: windows against plain slicing, each token predicted once, what it tells the framework, YAML and flags."""

import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from bigmodel.tasks.language_modeling import shards
from bigmodel.tasks.language_modeling.data import TextBatch, TextData, TextWindows
from bigmodel.tasks.language_modeling.shards import PreparedText, ShardWriter, SplitStatistics, TokenArray
from bigmodel.tasks.language_modeling.splits import ContiguousSplit, DocumentHashSplit, FileSplit
from bigmodel.tasks.language_modeling.tokenizer_config import BPE, Bytes

END = 999


def tokens_on_disk(folder, values, shard_tokens):
    with ShardWriter(folder, "train", shards.token_dtype(1000), shard_tokens) as writer:
        writer.write(np.array(values, shards.token_dtype(1000)))
    facts = {"train": SplitStatistics(len(values), 1, 1, writer.sha256)}
    PreparedText(facts, 1000, END, "<u2", shard_tokens, "tokenizer.json", "").save(folder)
    return TokenArray(folder, "train")


@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 16, 17, 100])
@pytest.mark.parametrize("shard_tokens", [3, 1000])
def test_windows_equal_plain_slicing(tmp_path, num_tokens, shard_tokens):
    T = 8
    values = random.Random(num_tokens).choices(range(999), k=num_tokens)
    tokens = tokens_on_disk(tmp_path, values, shard_tokens)

    full = TextWindows(tokens, T, END, partial=False)
    assert len(full) == (num_tokens - 1) // T
    every = TextWindows(tokens, T, END, partial=True)
    order = list(range(len(every)))[::-1]
    batch = every.__getitems__(order)
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert batch.index.tolist() == order
    assert batch.weight.tolist() == [1.0] * len(order)
    for row, i in enumerate(order):
        inputs, targets = values[i * T : i * T + T], values[i * T + 1 : i * T + T + 1]
        assert batch.tokens[row].tolist() == inputs + [END] * (T - len(inputs))
        assert batch.targets[row].tolist() == targets + [-100] * (T - len(targets))
        if i < len(full):
            assert torch.equal(full[i].tokens, batch.tokens[row])
            assert -100 not in full[i].targets

    predicted = every.__getitems__(list(range(len(every)))).targets.flatten()
    assert predicted[predicted != -100].tolist() == values[1:]


def test_reading_far_more_than_is_kept_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RELEASE_READS", 3)
    values = random.Random(0).choices(range(999), k=5000)
    windows = TextWindows(tokens_on_disk(tmp_path, values, 2048), 10, END, partial=False)
    for i in random.Random(1).choices(range(len(windows)), k=200):
        assert windows[i].tokens.tolist() == values[i * 10 : i * 10 + 10]


def test_windows_are_cheap_to_send_to_workers(tmp_path):
    windows = TextWindows(tokens_on_disk(tmp_path, list(range(900)), 100), 8, END, partial=True)
    sent = pickle.dumps(windows)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[3].tokens, windows[3].tokens)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"Document {i}: déjà vu.\r\n" * 20, newline="")
    return folder


def data_of(text, **settings):
    settings = {
        "tokenizer": Bytes(),
        "split": DocumentHashSplit(0.3),
        "context_length": 32,
        "num_processes": 1,
        **settings,
    }
    data = TextData(str(text), cache_dir=str(text.parent / "cache"), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_what_the_framework_reads(text):
    data = data_of(text, batch_size=4, micro_batch_size=2, seed=7)
    assert data.sizes == {"vocab_size": 257, "context_length": 32}
    assert (data.batch_size, data.micro_batch_size, data.seed) == (4, 2, 7)
    assert data.tokenizer.decode(data.tokenizer.encode("é")) == "é"
    again = data_of(text, context_length=16)
    assert again.fingerprint == data.fingerprint
    assert data_of(text, tokenizer=BPE(300)).fingerprint != data.fingerprint


def test_bytes_per_token_and_text_are_those_of_the_documents(text):
    data = data_of(text, tokenizer=BPE(300))
    for split in ("train", "val"):
        raw = "".join(data.split_text(split)).encode()
        dataset = data.windows(split)
        batch = dataset.__getitems__(list(range(len(dataset))))
        if split == "val":
            predicted = int((batch.targets != -100).sum())
            assert data.bytes_per_token(split) == pytest.approx(len(raw) / predicted)
        ids = torch.cat([batch.tokens[0, :1], batch.targets[batch.targets != -100]]).tolist()
        decoded = data.tokenizer.decode([i for i in ids if i != data.tokenizer.eos_token_id]).encode()
        assert raw.startswith(decoded)
        assert len(decoded) > len(raw) - 200


def test_train_batches_are_windows_of_train_in_another_order(text):
    data = data_of(text, batch_size=8, micro_batch_size=4)
    batches = list(data.train_dataloader())
    assert all(isinstance(batch, TextBatch) and batch.tokens.shape == (4, 32) for batch in batches)
    seen = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(seen)) == len(seen) == len(data.windows("train")) // 8 * 8
    assert seen != sorted(seen)
    assert torch.equal(batches[3].tokens, data.windows("train").__getitems__(batches[3].index.tolist()).tokens)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_val_token_is_counted_once(text, num_workers):
    data = data_of(text, batch_size=7, num_workers=num_workers)
    batches = list(data.val_dataloader())
    rows = torch.cat([batch.targets[batch.weight > 0] for batch in batches])
    assert int((rows != -100).sum()) == data.prepared.splits["val"].tokens - 1


class _Nothing(L.LightningModule):
    """Needs data, learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": 0, "val": 0, "test": 0}

    def training_step(self, batch):
        self.seen["train"] += len(batch.index)
        return self.weight * batch.tokens.float().mean()

    def validation_step(self, batch):
        self.seen["val"] += int(batch.weight.sum())

    def test_step(self, batch):
        self.seen["test"] += int(batch.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", use_distributed_sampler=False, max_epochs=1, **quiet, **settings
    )


@pytest.mark.filterwarnings("ignore")
def test_under_a_trainer(text, tmp_path):
    data = data_of(text, split=DocumentHashSplit(0.3, 0.2))
    module, run = _Nothing(), trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert module.seen["train"] == len(data.windows("train")) // 16 * 16
    assert module.seen["val"] == len(data.windows("val"))
    assert module.seen["test"] == len(data.windows("test"))


@pytest.mark.filterwarnings("ignore")
def test_splits_that_are_not_there(text, tmp_path):
    data = data_of(text, split=DocumentHashSplit(val=0))
    module = _Nothing()
    trainer(tmp_path).fit(module, datamodule=data)
    assert module.seen["train"] > 0
    with pytest.raises(ValueError, match=r"no val split; .*\['train'\]: set --data.split.val"):
        trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    with pytest.raises(ValueError, match=r"no test split"):
        trainer(tmp_path).test(module, datamodule=data, verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 10**6}, r"the train split has [\d,]+ tokens, .* 1,000,001: .*--data.context_length"),
        ({"context_length": 0}, "--data.context_length 0"),
        ({"num_processes": 0}, "--data.num_processes 0"),
    ],
)
def test_impossible_sizes_are_refused(text, settings, message):
    with pytest.raises(ValueError, match=message):
        data_of(text, **settings)


def test_unprepared_text_is_refused(text, tmp_path):
    data = TextData(str(text), Bytes(), DocumentHashSplit(0.3), cache_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"not prepared .*call prepare_data first"):
        data.setup("fit")


def test_choices_come_from_yaml_and_flags(text):
    parser = ArgumentParser()
    parser.add_class_arguments(TextData, "data")
    here = "bigmodel.tasks.language_modeling"
    cases = [
        ([], (BPE(), DocumentHashSplit())),
        (
            [f"--data.tokenizer={here}.tokenizer_config.BPE", "--data.tokenizer.vocab_size=512"],
            (BPE(512), DocumentHashSplit()),
        ),
        ([f"--data.split={here}.splits.ContiguousSplit"], (BPE(), ContiguousSplit())),
        ([f"--data.split={here}.splits.FileSplit", '--data.split.val=["a"]'], (BPE(), FileSplit(["a"]))),
        ([f"--data.tokenizer={here}.tokenizer_config.Bytes"], (Bytes(), DocumentHashSplit())),
    ]
    for arguments, expected in cases:
        namespace = parser.parse_args([f"--data.path={text}", *arguments])
        again = parser.parse_string(parser.dump(namespace))
        data = parser.instantiate(again).data
        assert (data.tokenizer_config, data.split) == expected
