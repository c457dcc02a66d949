"""The drawings say what the numbers say, whatever the names; a failed one leaves nothing."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bigmodel.evaluation import plots
from bigmodel.evaluation.plots import Mistake, draw_confusion, draw_mistakes

MATRIX = np.array([[8, 2, 0], [0, 50, 50], [0, 0, 0]])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, as matplotlib holds them."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def mistake(image, true="4", predicted="9", probability=0.876, name="digits/4/x.png"):
    return Mistake(image, true, predicted, probability, name)


def test_colours_are_shares_of_a_row_and_cells_hold_the_counts(drawn, tmp_path):
    draw_confusion(MATRIX, ["a", "b", "c"], tmp_path / "new" / "confusion.png")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 0.5, 0.5], [0, 0, 0]])
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "8", (0, 1): "2", (1, 1): "50", (1, 2): "50"}
    assert axes.get_title() == "accuracy 52.73% of 110 images"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert (tmp_path / "new" / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("num_classes", "counts", "names"), [(20, True, True), (40, False, True), (100, False, False)])
def test_many_classes_have_no_counts_and_still_more_no_names(drawn, tmp_path, num_classes, counts, names):
    draw_confusion(np.eye(num_classes, dtype=int), [f"class {k}" for k in range(num_classes)], tmp_path / "c.png")
    axes = drawn[0].axes[0]
    assert bool(axes.texts) == counts
    assert ("class 7" in [label.get_text() for label in axes.get_xticklabels()]) == names
    with Image.open(tmp_path / "c.png") as image:
        assert max(image.size) < 2500


def test_names_are_text_and_nothing_else(drawn, tmp_path):
    names = ["costs $5_$x", "犬", "a" * 200]
    draw_confusion(MATRIX, names, tmp_path / "c.png")
    draw_mistakes([mistake(np.zeros((5, 5, 3), np.uint8), *names[:2], name="$^$.png")], tmp_path / "m.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == [*names[:2], "a" * 23 + "…"]
    assert [text.get_text() for text in drawn[1].axes[0].texts] == ["costs $5_$x", "犬  88%", "$^$.png"]


def test_a_sheet_shows_each_mistake_once(drawn, tmp_path):
    images = [np.full((28, 28, 1), 10 * i, np.uint8) for i in range(11)]
    draw_mistakes([mistake(image, probability=i / 100) for i, image in enumerate(images)], tmp_path / "m.png")
    used = [axes for axes in drawn[0].axes if axes.images]
    for axes, image, i in zip(used, images, range(11), strict=True):
        assert np.array_equal(axes.images[0].get_array(), image[..., 0])
        assert [text.get_text() for text in axes.texts] == ["4", f"9  {i}%", "x.png"]


def test_a_small_image_is_enlarged_pixel_by_pixel(tmp_path):
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0], image[1, 1] = (255, 0, 0), (0, 0, 255)
    draw_mistakes([mistake(image)], tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as drawing:
        sheet = np.asarray(drawing.convert("RGB")).reshape(-1, 3)
    red, blue = (sheet == (255, 0, 0)).all(1).sum(), (sheet == (0, 0, 255)).all(1).sum()
    assert red > 5000
    assert abs(int(red) - int(blue)) < 0.02 * red


def test_a_failed_drawing_leaves_the_earlier_one(tmp_path, monkeypatch):
    draw_confusion(MATRIX, ["a", "b", "c"], tmp_path / "c.png")
    before = (tmp_path / "c.png").read_bytes()

    def full_disk(self, path, **options):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        draw_confusion(MATRIX, ["a", "b", "c"], tmp_path / "c.png")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
    assert (tmp_path / "c.png").read_bytes() == before
