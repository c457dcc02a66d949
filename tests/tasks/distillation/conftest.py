"""What tests of distillation share."""

from pathlib import Path

import pytest
import torch
from distillation import of_text

from bigmodel.cli import main

WORDS = ["teachers", "students", "books", "letters", "numbers", "questions", "answers"]


@pytest.fixture(scope="session")
def school(tmp_path_factory):
    """A folder with texts and a trained `teacher-run`."""
    folder = tmp_path_factory.mktemp("school")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        Path("text").mkdir()
        for number in range(40):
            text = " ".join(WORDS[(number + i * (1 + number % 3)) % 7] for i in range(12 + number))
            Path("text", f"{number}.txt").write_text(f"{number}. {text}.")
        Path("empty.yaml").write_text("trainer: {max_epochs: null, max_steps: 6, accelerator: cpu}")
        main(of_text("teacher", width=32, trainer__max_steps=30))
        (record,) = Path("teacher").glob("**/run.json")
        record.parent.rename("teacher-run")
    return folder
