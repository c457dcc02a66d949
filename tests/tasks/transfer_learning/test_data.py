"""Batches of labelled texts: tokens, targets and indices equal those of a plain loop, for any number of processes."""

import csv
import pickle
from types import SimpleNamespace

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.transfer_learning import LabelledTextData
from bigmodel.tasks.transfer_learning.batches import TextDataset


@pytest.fixture
def table(tmp_path):
    """Write a CSV file."""

    def write(header, rows, name="t.csv"):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return str(tmp_path / name)

    return write


@pytest.fixture
def reviews(table, texts):
    """60 texts of the classes a (30), b (18) and c (12)."""
    return table(["text", "label"], [(text, "aabaabccb"[i % 9] if i < 54 else "a") for i, text in enumerate(texts(60))])


def rows(loader):
    """Tokens and target of each sample of a loader by its index, without padding rows."""
    found = {}
    for batch in loader:
        for i, index in enumerate(batch.index.tolist()):
            if batch.weight[i]:
                assert index not in found
                found[index] = (batch.tokens[i][batch.mask[i]].tolist(), batch.targets[i].tolist())
    return found


def as_process(made, rank=0, num_processes=1, global_step=0):
    """The data module in one of several processes."""
    share = {"rank": rank, "num_replicas": num_processes}
    state = SimpleNamespace(fn=None)
    made.trainer = SimpleNamespace(
        distributed_sampler_kwargs=share, global_step=global_step, state=state, callbacks=[], limit_train_batches=1.0
    )
    return made


def test_each_split_has_each_text_once(data, encoder, reviews, capsys):
    made = data(reviews, max_length=12)
    with open(reviews, newline="") as file:
        labels = dict(list(csv.reader(file))[1:])
    seen = []
    for split, loader in (
        ("train", made.train_dataloader()),
        ("val", made.val_dataloader()),
        ("test", made.test_dataloader()),
    ):
        some = made.texts(split)
        found = rows(loader)
        assert len(found) == len(some) - (len(some) % 4 if split == "train" else 0)
        for index, (tokens, target) in found.items():
            assert tokens == encoder.truncate(encoder.encode([some[index]])[0], 12).tolist()
            assert made.classes[target] == labels[some[index]]
        seen += [some[i] for i in range(len(some))]
    assert sorted(seen) == sorted(labels)
    assert (made.classes, made.sizes, made.problem_type) == (
        ["a", "b", "c"],
        {"num_classes": 3},
        "single_label_classification",
    )
    longer = sum(len(encoder.encode([text])[0]) > 12 for text in labels)
    assert f"{100 * longer / 60:.1f} % of the texts are longer than 12 tokens" in capsys.readouterr().err


def test_batches_are_padded_to_the_longest_text(data, reviews):
    made = data(reviews, seed=3)
    for epoch in range(2):
        loader = made.train_dataloader()
        loader.set_epoch(epoch)
        for batch in loader:
            lengths = batch.mask.sum(1)
            assert batch.tokens.shape[1] == -(-int(lengths.max()) // 8) * 8
            assert batch.mask.equal(torch.arange(batch.tokens.shape[1]) < lengths[:, None])
            assert (batch.tokens[~batch.mask] == 0).all()
            assert (batch.tokens[batch.mask] != 0).all()
            assert batch.key.equal(torch.from_numpy(sample_keys(3, epoch, batch.index.numpy())))
            kinds = [batch.tokens, batch.mask, batch.segments, batch.targets, batch.index, batch.weight, batch.key]
            assert [t.dtype for t in kinds] == [torch.int64, torch.bool, *[torch.int64] * 3, torch.float32, torch.int64]


def test_group_by_length_reduces_padding(data):
    shares = []
    for grouped in (True, False):
        loader = data("{fine_foods}", max_length=128, batch_size=32, group_by_length=grouped).train_dataloader()
        shares.append(1 - np.mean([batch.mask.float().mean() for batch in loader]))
    assert shares[0] < 0.1 < 0.3 < shares[1], shares


@pytest.mark.parametrize("balance", ["none", "samples"])
def test_order_is_independent_of_processes_and_resume(data, reviews, balance):
    made = data(reviews, batch_size=6, balance=balance)
    straight = [sorted(batch.index.tolist()) for batch in as_process(made).train_dataloader()]
    for step in (0, 3):
        taken = [list(as_process(made, rank, 3, step).train_dataloader()) for rank in range(3)]
        steps = [sorted(i for batch in batches for i in batch.index.tolist()) for batches in zip(*taken, strict=True)]
        assert steps == straight[step:]
    whole = rows(as_process(made).test_dataloader())
    parts = [rows(as_process(made, rank, 3).test_dataloader()) for rank in range(3)]
    assert {index: row for part in parts for index, row in part.items()} == whole
    assert sum(map(len, parts)) == len(whole)


def test_workers_read_the_same_batches(data, reviews):
    made = data(reviews)
    expected = rows(made.train_dataloader())
    made.num_workers = 2
    assert rows(made.train_dataloader()) == expected
    samples = pickle.loads(pickle.dumps(made.val_dataloader().dataset.dataset))
    assert isinstance(samples, TextDataset)
    assert samples[0].tokens.tolist() == made.val_dataloader().dataset.dataset[0].tokens.tolist()


def test_segments_of_pairs(data, encoder, table):
    path = table(["text", "other", "label"], [(f"a {i}", f"is b {i}", i % 2) for i in range(20)])
    made = data(path, pair_column="other")
    some, batch = made.texts("train"), next(iter(made.train_dataloader()))
    first, second = some.text(int(batch.index[0])), some.pair(int(batch.index[0]))
    tokens = encoder.encode([first], [second])[0]
    assert batch.tokens[0][batch.mask[0]].tolist() == tokens.tolist()
    assert batch.segments[0][batch.mask[0]].tolist() == encoder.segments(tokens).tolist()
    assert some[int(batch.index[0])] == f"{first} | {second}"


def test_multi_label_and_regression_targets(data, table, texts):
    cells = [["x", "y"], ["y"], ["z", "x"], []]
    path = table(["text", "label"], [(text, str(cells[i % 4]).replace("'", '"')) for i, text in enumerate(texts(40))])
    made = data(path)
    assert (made.problem_type, made.classes, made.sizes) == (
        "multi_label_classification",
        ["x", "y", "z"],
        {"num_classes": 3},
    )
    for batch in made.train_dataloader():
        for target, index in zip(batch.targets, batch.index.tolist(), strict=True):
            number = int(made.texts("train")[index].split()[-1])
            assert {name for name, one in zip("xyz", target.tolist(), strict=True) if one} == set(cells[number % 4])
        assert batch.targets.dtype == torch.float32
    made = data(table(["text", "label"], [(text, i / 4) for i, text in enumerate(texts(40))]))
    assert (made.problem_type, made.classes, made.sizes) == ("regression", [], {"num_classes": 1})
    for batch in made.train_dataloader():
        expected = [int(made.texts("train")[index].split()[-1]) / 4 for index in batch.index.tolist()]
        assert batch.targets.tolist() == expected


def test_balance_weights_or_oversamples(data, reviews):
    made = data(reviews, balance="weights", batch_size=1)
    counts = np.bincount([target for _, target in rows(made.train_dataloader()).values()])
    expected = counts.sum() / (3 * counts)
    assert counts.tolist() == [24, 14, 10]
    for batch in made.train_dataloader():
        assert batch.weight.item() == pytest.approx(expected[batch.targets.item()])
    assert all(batch.weight.eq(1).all() for batch in made.val_dataloader())
    made = data(reviews, balance="samples", batch_size=1)
    loader, met = made.train_dataloader(), np.zeros((2, 48), int)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            met[epoch][batch.index.item()] += 1
    targets = made.train_dataloader().dataset.dataset.targets
    for epoch in met:
        assert np.bincount(targets, epoch).tolist() == [24, 24, 24]


def test_shots_reduce_the_training_split_only(data, reviews):
    made = data(reviews, shots=4)
    others = data(reviews)
    assert len(made.texts("train")) == 12
    assert [made.texts("test")[i] for i in range(6)] == [others.texts("test")[i] for i in range(6)]
    assert made.fingerprint != others.fingerprint
    assert data(reviews, shots=4).fingerprint == made.fingerprint != data(reviews, shots=4, seed=1).fingerprint


def test_pseudo_labels_extend_the_training_split(data, reviews, tmp_path, capsys):
    known = data(reviews).texts("test")[0]
    table = {
        "text": ["sure of this", "unsure of this", known, "sure of that"],
        "class": ["c", "a", "a", "a"],
        "probability": [0.95, 0.85, 0.99, 0.9],
    }
    path = tmp_path / "predictions.parquet"
    pq.write_table(pa.table(table), path)
    made = data(reviews, shots=4, pseudo_labels=str(path), batch_size=1)
    some = made.texts("train")
    assert len(some) == 14
    found = {some[index]: made.classes[target] for index, (_, target) in rows(made.train_dataloader()).items()}
    assert {text: found[text] for text in ("sure of this", "sure of that")} == {
        "sure of this": "c",
        "sure of that": "a",
    }
    assert known not in found
    output = capsys.readouterr().err
    assert (
        "pseudo-labels: 2 of 4 predictions are added to the training texts, with a probability of at least 0.9 (a 1, b 0"
        in output
    )
    assert "1 more are of texts that have a label" in output
    for changed, message in (
        ({"class": ["d", "a", "a", "a"]}, r"the classes \['d'\], which are not among the 3"),
        ({"probability": [0.1] * 4}, "of 4 predictions 0 have a probability of at least --data.min_confidence 0.9"),
        ({"class": None}, r"not \['class'\]: set it to a file"),
    ):
        columns = {name: values for name, values in (table | changed).items() if values is not None}
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=message):
            data(reviews, pseudo_labels=str(path))


def test_predict_dataloader_without_labels_in_order(data, table, texts):
    path = table(["text"], [(text,) for text in texts(30)], "test.csv")
    made = data(path, stage="predict")
    loader = made.predict_dataloader()
    assert [i for batch in loader for i in batch.index[batch.weight > 0].tolist()] == list(range(30))
    assert [made.texts("all")[i] for i in range(30)] == texts(30)
    assert {target for _, target in rows(loader).values()} == {-1}
    assert not hasattr(made, "sizes")


class Reader(L.LightningModule):
    """Records the indices of the samples of each split."""

    def __init__(self, encoder):
        super().__init__()
        self.text_encoder, self.weight, self.seen = encoder, torch.nn.Parameter(torch.zeros(1)), {}

    def step(self, batch, split):
        self.seen.setdefault(split, []).extend(batch.index[batch.weight > 0].tolist())
        return (self.weight * batch.mask.sum()).sum()

    def training_step(self, batch):
        return self.step(batch, "train")

    def validation_step(self, batch):
        self.step(batch, "val")

    def test_step(self, batch):
        self.step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_tokenizer_of_the_task_is_used(encoder, cache, reviews, tmp_path):
    task, made = Reader(encoder), LabelledTextData(reviews, batch_size=4, cache_dir=str(cache))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", use_distributed_sampler=False, **options)
    trainer.fit(task, made)
    trainer.test(task, made, verbose=False)
    assert {split: sorted(seen) for split, seen in task.seen.items()} == {
        "train": list(range(48)),
        "val": list(range(6)),
        "test": list(range(6)),
    }
    assert made.encoder is encoder


def test_invalid_settings_and_data_raise(data, reviews, table, tmp_path):
    def refused(message, path=reviews, **options):
        with pytest.raises(ValueError, match=message):
            data(path, **options)

    refused("--data.max_length 600 .* at most 512", max_length=600)
    refused("--data.max_length 2 is too small", max_length=2)
    refused("--data.shots 20: 2 of 3 classes .* 'b' has 14, 'c' has 10; set at most 10", shots=20)
    refused("--data.balance often: accepted are none, weights, samples", balance="often")
    refused("--data.fold 2 requires --data.folds", fold=2)
    refused("--data.min_confidence 1.5", min_confidence=1.5)
    refused("has no tokenizer .*--data.tokenizer", tokenizer=None)
    two = [table(["text", "label"], some, f"{name}.csv") for name, some in (
        ("train", [(f"a {i}", "xy"[i % 2]) for i in range(20)]),
        ("test", [("b", "x"), ("c", "z"), ("d", "w")]),
    )]  # fmt: skip
    refused(r"test.csv row 2: the class 'z' of the test split has no training text \(2 such classes: 'w', 'z'\)", two)
    refused(
        "the class 'x' only: at least 2 classes",
        table(["text", "label"], [(f"{i}", "x") for i in range(9)]),
    )
    numbers = table(["text", "label"], [(f"text {i}", i / 2) for i in range(20)])
    refused("--data.balance weights requires single_label_classification", numbers, balance="weights")
    refused("--data.shots null", numbers, shots=2)
    made = data(reviews, split=SimpleNamespace(val=0.0, test=0.0, seed=0))
    with pytest.raises(ValueError, match=r"no test split, only train: set --data.split.test to a share"):
        made.test_dataloader()


def test_tokenizer_other_than_the_backbones_raises(encoder, reviews, cache, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=other, unk_token="[UNK]").save_pretrained(tmp_path / "other")
    made = LabelledTextData(reviews, tokenizer=str(tmp_path / "other"), cache_dir=str(cache))
    made.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(text_encoder=encoder), state=SimpleNamespace(fn=None)
    )
    with pytest.raises(ValueError, match=r"set --data\.tokenizer null"):
        made.prepare_data()
