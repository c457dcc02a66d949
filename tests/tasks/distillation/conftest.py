"""Fixtures for the tests of distillation."""

from pathlib import Path

import pytest
import torch
from distillation import of_text, write_texts

from bigmodel.cli import main


@pytest.fixture(scope="session")
def school(tmp_path_factory):
    """A folder with texts and a trained `teacher-run`."""
    folder = tmp_path_factory.mktemp("school")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        write_texts()
        Path("empty.yaml").write_text("trainer: {max_epochs: null, max_steps: 6, accelerator: cpu}")
        main(of_text("teacher", width=32, trainer__max_steps=30))
        (record,) = Path("teacher").glob("**/run.json")
        record.parent.rename("teacher-run")
    return folder
