"""Cached logits: packed, read and compared."""

import pytest
import torch

from bigmodel.tasks.distillation import cache, losses
from bigmodel.tasks.distillation.cache import TeacherCache


def logits_of(num_classes, seed=0):
    return 3 * torch.randn(2, 3, num_classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_classes", [5, 40_000, 70_000])
def test_the_likeliest_classes_come_back(num_classes):
    """In 16 bits without a sign as long as they suffice."""
    teacher = logits_of(num_classes)
    teacher[0, 0, num_classes - 1] = 99
    kept = TeacherCache(top_k=4).pack(teacher, 2)
    fields = TeacherCache(top_k=4).fields(teacher.shape[1:])
    assert kept["classes"].shape[1:] == fields["classes"].shape == (3, 4)
    assert fields["classes"].dtype == (torch.int16 if num_classes <= 2**16 else torch.int32)
    assert kept["log_probabilities"].shape[1:] == fields["log_probabilities"].shape == (3, 5)
    stored = {name: values.to(fields[name].dtype) for name, values in kept.items()}
    classes, log_p = cache.unpack(stored)
    assert torch.equal(classes, teacher.flatten(0, 1).topk(4).indices)
    assert classes[0, 0] == num_classes - 1
    student = logits_of(num_classes, seed=1).flatten(0, 1)
    log_student, log_teacher = cache.log_probabilities(student, [classes, log_p], 2)
    torch.testing.assert_close(log_teacher.exp().sum(1), torch.ones(6))
    expected = losses.partition(teacher.flatten(0, 1), classes, 2)
    torch.testing.assert_close(log_teacher.exp(), expected.exp(), atol=1e-3, rtol=1e-2)
    coarse = losses.kd(log_student, log_teacher, 2)
    whole = losses.kd(losses.log_probabilities(student, 2), losses.log_probabilities(teacher.flatten(0, 1), 2), 2)
    assert (coarse <= whole + 0.05).all()


def test_all_logits_come_back_in_half_precision():
    teacher = logits_of(7)
    kept = TeacherCache().pack(teacher, 4)
    fields = TeacherCache().fields(teacher.shape[1:])
    assert fields["logits"].row_bytes == 3 * 7 * 2
    (rows,) = cache.unpack({"logits": kept["logits"].half()})
    student = logits_of(7, seed=1).flatten(0, 1)
    _, log_teacher = cache.log_probabilities(student, [rows], 4)
    expected = losses.log_probabilities(teacher.half().flatten(0, 1), 4)
    torch.testing.assert_close(log_teacher, expected)


def test_language_models_in_chunks_and_from_a_cache(tmp_path, monkeypatch):
    """All that is predicted from chunks of the student's features, and a teacher of whom all 257 tokens are kept."""
    import bigmodel
    from bigmodel.cli import main

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"chapter {number}: of students and their teachers. " * 3)
    (tmp_path / "empty.yaml").write_text("trainer: {max_epochs: null, max_steps: 3, accelerator: cpu}")
    lm, ours = "bigmodel.tasks.language_modeling", "bigmodel.tasks.distillation"

    def fit(runs_dir, task, **settings):
        data = {
            "data": f"{lm}.TextData",
            "data.path": "text",
            "data.tokenizer": f"{lm}.Bytes",
            "data.cache_dir": "cache",
        }
        data |= {
            "data.split": f"{lm}.ContiguousSplit",
            "data.context_length": 16,
            "data.batch_size": 4,
            "callbacks.progress": "null",
            "runs_dir": runs_dir,
        }
        net = {"net": "bigmodel.nn.GPT", "net.width": 16, "net.depth": 1, "net.num_heads": 2}
        net = {f"{task}.{key}": value for key, value in net.items()}
        given = {key.replace("__", "."): value for key, value in settings.items()}
        every = {**data, **given, task: f"{lm}.LanguageModeling", **net}
        main(["fit", "-c", "empty.yaml", *(f"--{key}={value}" for key, value in every.items())])
        (record,) = (tmp_path / runs_dir).glob("**/run.json")
        return record.parent

    teacher = fit("teacher", "model")
    student = {"model": f"{ours}.Distillation", "model__teacher": str(teacher)}
    kept = {"model__cache": f"{ours}.TeacherCache", "model__cache__top_k": 300, "model__cache__dtype": "float32"}
    asked = bigmodel.load(fit("asked", "model.student", **student), "last").state_dict()
    chunks = {"model__chunk_size": 7, "model__student__loss_chunk_size": 9, "model__cache__folder": "kept"}
    read = bigmodel.load(fit("read", "model.student", **student, **kept, **chunks), "last").state_dict()
    for name in asked:
        torch.testing.assert_close(asked[name], read[name], rtol=0, atol=1e-5)
