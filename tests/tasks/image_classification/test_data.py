"""The data module of images: what it reads, in which order, with which randomness, and where that is the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigmodel.data.sampling import eval_loader
from bigmodel.tasks.image_classification import (
    ImageData,
    ImageSplit,
    MixupCutMix,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
)


def data(path, tmp_path, **options):
    options = {
        "size": 8,
        "resize": 10,
        "batch_size": 16,
        "num_workers": 0,
        "cache_dir": str(tmp_path / "cache"),
    } | options
    made = ImageData(str(path), **options)
    made.prepare_data()
    made.setup("fit")
    return made


def epoch_of(made, epoch=0):
    loader = made.train_dataloader()
    loader.set_epoch(epoch)
    return [made.finish(batch, "train", training=True) for batch in loader]


def same(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_a_split_reads_as_pillow_reads_it(photos, tmp_path):
    made = data(photos, tmp_path, split=ImageSplit(0.25, 0.25))
    assert made.sizes == {"num_classes": 3, "in_channels": 3, "image_size": 8}
    assert made.classes == ["cool", "leafy", "warm"]
    counts = {split: len(made.images(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 48, "val": 24, "test": 24}
    images = made.images("val")
    batch = next(iter(made.val_dataloader()))
    for pixels, label, index in zip(batch.images, batch.targets, batch.index, strict=True):
        path = Path(images.name(int(index)))
        assert path.parent.name == made.classes[label]
        with Image.open(path) as image:  # 12 x 10: the shorter edge is 10 already, the centre 8 x 8 is cut out
            expected = np.asarray(image)[1:9, 2:10]
        assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_decoded_ahead_or_when_read_or_on_the_device_it_is_the_same(photos, tmp_path):
    ways = [
        {"cache_decoded": True},
        {"cache_decoded": False},
        {"cache_on_device": True},
        {"cache_decoded": False, "num_workers": 2},
    ]
    options = {"augment": [RandomCrop(2), RandomFlip()], "mix": MixupCutMix(0.5, 0.5)}
    first, *others = (epoch_of(data(photos, tmp_path, **options, **way)) for way in ways)
    assert len(first) == 5
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize("crop", [None, RandomResizedCrop((0.3, 1.0))])
def test_randomness_is_a_function_of_seed_epoch_and_sample(photos, tmp_path, crop):
    def by_sample(batches):
        return {int(i): image for batch in batches for i, image in zip(batch.index, batch.images, strict=True)}

    options = {"augment": [RandomCrop(2), RandomFlip()], "crop": crop, "split": ImageSplit(0.0)}
    made = data(photos, tmp_path, **options)
    whole, again, next_epoch = (by_sample(epoch_of(made, epoch)) for epoch in (0, 0, 1))
    in_small_batches = by_sample(epoch_of(data(photos, tmp_path, **options, micro_batch_size=2)))
    assert all(torch.equal(whole[i], again[i]) for i in whole)
    assert all(torch.equal(whole[i], in_small_batches[i]) for i in whole)
    assert sum(torch.equal(whole[i], next_epoch[i]) for i in whole) < 20
    viewed = data(photos, tmp_path, **options, num_augmentation_epochs=2)
    assert same(epoch_of(viewed, 0), epoch_of(viewed, 2))
    assert not same(epoch_of(viewed, 0), epoch_of(viewed, 1))


def test_a_mixing_partner_is_the_same_in_any_micro_batch(photos, tmp_path):
    whole, small = (
        epoch_of(data(photos, tmp_path, mix=MixupCutMix(1.0, 1.0), micro_batch_size=micro)) for micro in (16, 2)
    )
    for field in ("images", "targets"):
        assert torch.equal(torch.cat([getattr(b, field) for b in whole]), torch.cat([getattr(b, field) for b in small]))


def test_evaluation_is_neither_augmented_nor_mixed(photos, tmp_path):
    plain = data(photos, tmp_path)
    made = data(
        photos, tmp_path, augment=[RandomCrop(2), RandomFlip()], mix=MixupCutMix(1.0, 1.0), crop=RandomResizedCrop()
    )
    batches = [[d.finish(batch, "val") for batch in d.val_dataloader()] for d in (plain, made)]
    assert len(batches[0]) > 0
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert other.targets.dtype == torch.int64


def test_class_weights_make_classes_count_alike(photos, tmp_path):
    made = data(photos, tmp_path, balance="weights", split=ImageSplit(0.0), batch_size=96)
    (batch,) = epoch_of(made)
    sums = torch.zeros(3).index_add_(0, batch.targets, batch.weight)
    torch.testing.assert_close(sums, torch.full((3,), 32.0))
    made = data(photos, tmp_path, balance="weights", split=ImageSplit(0.5), batch_size=96)
    (batch,) = made.evaluation_loader("val")  # padded with weight 0
    assert set(batch.weight.tolist()) <= {0.0, 1.0}


def test_balanced_samples_meet_each_class_as_often(photos, tmp_path):
    made = data(photos, tmp_path, balance="samples", split=ImageSplit(0.0), batch_size=24, augment=[RandomCrop(3)])
    batches = [batch for epoch in range(3) for batch in epoch_of(made, epoch)]
    targets = torch.cat([b.targets for b in batches])
    assert torch.bincount(targets).tolist() == [120, 120, 120]
    keys = torch.cat([b.key for b in batches])
    assert len(keys.unique()) == len(keys)  # an image met again is augmented anew


def test_what_cannot_be_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match=r"no test split but train, val: set --data.split.test"):
        data(photos, tmp_path).test_dataloader()
    with pytest.raises(ValueError, match=r"--data.cache_on_device true needs decoded images of one size"):
        ImageData(str(photos), cache_on_device=True, crop=RandomResizedCrop())
    with pytest.raises(ValueError, match=r"even --data.micro_batch_size"):
        epoch_of(data(photos, tmp_path, mix=MixupCutMix(1.0), batch_size=15))


def test_padding_rows_have_no_weight(photos, tmp_path):
    made = data(photos, tmp_path, split=ImageSplit(0.25))
    loader = eval_loader(made.val_dataloader().dataset.dataset, batch_size=7)
    weights = torch.cat([batch.weight for batch in loader])
    assert len(weights) == 28
    assert weights.sum() == 24


def names_of(made, split="train"):
    images = made.images(split)
    return {images.name(i) for i in range(len(images))}


def test_some_classes_are_as_if_there_were_no_others(photos, tmp_path):
    made = data(photos, tmp_path, classes=["warm", "cool"], split=ImageSplit(0.25, 0.25))
    assert made.classes == ["cool", "warm"]
    assert made.sizes["num_classes"] == 2
    whole = data(photos, tmp_path, split=ImageSplit(0.25, 0.25))
    for split in ("train", "val", "test"):
        images = made.images(split)
        assert names_of(made, split) == {name for name in names_of(whole, split) if "leafy" not in name}
        assert all(Path(images.name(i)).parent.name == made.classes[k] for i, k in enumerate(images.labels))
    with pytest.raises(ValueError, match=r"--data.classes blue: .* cool, leafy, warm"):
        data(photos, tmp_path, classes=["blue", "cool"])


def test_shots_are_nested_drawn_by_the_seed_and_leave_evaluation_alone(photos, tmp_path):
    split = ImageSplit(0.25, 0.25)
    whole, *drawn = (data(photos, tmp_path, split=split, shots=n) for n in (None, 2, 5, 12))
    assert [len(names_of(made)) for made in drawn] == [6, 15, 36]
    assert names_of(drawn[0]) < names_of(drawn[1]) < names_of(drawn[2]) < names_of(whole)
    for made in drawn:
        assert np.unique(made.images("train").labels, return_counts=True)[1].tolist() == [made.shots] * 3
        assert names_of(made, "val") == names_of(whole, "val")
        assert made.fingerprint != whole.fingerprint
    assert names_of(data(photos, tmp_path, split=split, shots=5, seed=1)) != names_of(drawn[1])
    message = r"--data.shots 13: 1 of 3 classes have fewer .*: 'cool' has 12; set at most 12"
    with pytest.raises(ValueError, match=message):
        data(photos, tmp_path, split=split, shots=13)
    with pytest.raises(ValueError, match=r"--data.shots 0: at least 1"):
        data(photos, tmp_path, split=split, shots=0)
