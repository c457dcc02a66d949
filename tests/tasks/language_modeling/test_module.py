"""The language model as a task: against a plain loop, brute force and itself killed in mid-epoch."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import bigmodel
from bigmodel.cli import main
from bigmodel.data.sampling import train_loader
from bigmodel.nn import GPT
from bigmodel.run import checkpoint_step
from bigmodel.tasks.language_modeling import ContiguousSplit, TextData
from bigmodel.training.optimizers import parameter_groups
from bigmodel.training.schedules import Cosine

LM = "bigmodel.tasks.language_modeling"
EXPERIMENT = Path(__file__).parents[3] / "experiments" / "language_modeling" / "stdlib.yaml"
STEPS = 24


def words(*flags):
    """A tiny model on the json package's source, in bytes, several epochs long, validated in mid-epoch."""
    settings = {
        "model.net": "bigmodel.nn.GPT", "model.net.width": 16, "model.net.depth": 2, "model.net.num_heads": 2,
        "model.net.dropout": 0.1, "data.path": "text", "data.cache_dir": "cache", "data.num_processes": 1,
        "data.tokenizer": f"{LM}.Bytes", "data.split": f"{LM}.ContiguousSplit", "data.split.val": 0.3,
        "data.context_length": 64,
        "data.batch_size": 32, "data.micro_batch_size": 16, "trainer.precision": "32-true", "trainer.accelerator": "cpu",
        "trainer.max_steps": STEPS, "trainer.val_check_interval": 5, "trainer.log_every_n_steps": 1,
        "callbacks.samples": "null", "callbacks.progress": "null", "callbacks.last.every_n_steps": 3,
        "callbacks.last.every_n_minutes": "null", "callbacks.last.save_top_k": -1,
    }  # fmt: skip
    listed = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return ["fit", "-c", str(EXPERIMENT), *listed, *map(str, flags)]


def runs():
    return sorted((path.parent for path in Path("runs").glob("**/run.json")), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with the text and one finished run."""
    folder = tmp_path_factory.mktemp("lm")
    source = Path(sysconfig.get_paths()["stdlib"]) / "json"
    shutil.copytree(source, folder / "text", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        main(words())
        (run,) = runs()
        yield run.resolve()


@pytest.fixture
def folder(straight, monkeypatch):
    monkeypatch.chdir(straight.parents[3])
    return straight.parents[3]


def weights(run, step=STEPS):
    return torch.load(run / "checkpoints" / f"last-{step}.ckpt", weights_only=True)["state_dict"]


def column(run, name):
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return {int(row[0]): float(row[header.index(name)]) for row in rows if row[header.index(name)]}


def data_of(run):
    data = bigmodel.load_data(run)
    data.setup("fit")
    return data


def test_losses_equal_a_plain_loop_step_by_step(folder):
    main(words("--model.net.dropout", 0, "--data.micro_batch_size", "null", "--trainer.max_steps", 50))
    run = runs()[-1]
    ours = column(run, "train/loss")

    data = data_of(run)
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    torch.manual_seed(0)
    net = GPT(**data.sizes, **model["net"]["init_args"])
    rate = model["optimizer"]["init_args"]["lr"]
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = Cosine(**model["schedule"]["init_args"])
    loader = train_loader(data.windows("train"), batch_size=32)
    plain, step, epoch = {}, 0, 0
    while step < 50:
        loader.set_epoch(epoch)
        for batch in loader:
            if step == 50:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, 50)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch.tokens).flatten(0, 1), batch.targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
            plain[step] = loss.item()
        epoch += 1
    assert ours.keys() == plain.keys()
    assert max(abs(ours[step] - plain[step]) for step in plain) < 1e-4
    assert plain[50] < plain[1] - 1


def test_validation_counts_every_token_once(straight, folder, capsys):
    """Loss, perplexity and bits per byte, from the definition, token by token."""
    main(["validate", str(straight), "--checkpoint", "last"])
    logged = json.loads((straight / "validate.json").read_text())
    task, data = bigmodel.load(straight, "last"), data_of(straight)
    stream = torch.tensor(data.tokenizer.encode("".join(data.split_text("val"))))
    documents = data.prepared.splits["val"].documents
    nats, count = 0.0, 0
    windows = data.windows("val")
    for i in range(len(windows)):
        window = windows[i]
        kept = window.targets != -100
        with torch.no_grad():
            logits = task.net(window.tokens[None])[0]
        losses = F.cross_entropy(logits[kept].double(), window.targets[kept], reduction="none")
        nats, count = nats + losses.sum().item(), count + len(losses)
    assert count == len(stream) + documents - 1, "every byte and every end of a document, but the first token"
    assert logged["val/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert logged["val/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert logged["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / len(stream), rel=1e-5)
    assert column(straight, "val/loss")[STEPS - STEPS % 5] > 0


def test_chunks_of_logits_change_nothing(straight, folder):
    main(words("--model.loss_chunk_size", 100))
    chunked = runs()[-1]
    for name, tensor in weights(straight).items():
        torch.testing.assert_close(weights(chunked)[name], tensor, rtol=0, atol=1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(straight, folder):
    """kill -9 in mid-epoch, dropout on: final weights and every later validation are bitwise those of the straight run."""
    slow = ["--callbacks.slow", "slow.Slow", "--runs_dir", "killed"]
    (folder / "slow.py").write_text(
        "import time\nfrom lightning.pytorch import Callback\n\n\nclass Slow(Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n        time.sleep(1000 if trainer.global_step >= 10 else 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "bigmodel", *words(*slow)], env=environment)
    while not list(Path("killed").glob("**/last-9.ckpt")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (record,) = Path("killed").glob("**/run.json")
    stopped = record.parent
    assert max(checkpoint_step(path) for path in (stopped / "checkpoints").iterdir()) < STEPS
    assert not list((stopped / "checkpoints").glob("last-*-v*"))
    main(["fit", "--resume", str(stopped), "--callbacks.slow", "null"])
    assert column(straight, "train/loss") == column(stopped, "train/loss")
    assert column(straight, "val/loss") == column(stopped, "val/loss")
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(stopped)[name]), name


def test_a_loaded_task_generates_with_no_data_present(straight, tmp_path, monkeypatch):
    copied = tmp_path / "copied"
    shutil.copytree(straight, copied)
    monkeypatch.chdir(tmp_path)
    task = bigmodel.load(copied)
    text = task.generate("def loads(", max_new_tokens=80, temperature=0)
    assert text == task.generate("def loads(", max_new_tokens=80, temperature=0)
    assert "".join(task.stream("def loads(", max_new_tokens=80, temperature=0)) == text
    assert task.generate("x", seed=1, max_new_tokens=40) == task.generate("x", seed=1, max_new_tokens=40)
    assert task.generate("x", seed=1, max_new_tokens=40) != task.generate("x", seed=2, max_new_tokens=40)
    with pytest.raises(ValueError, match=r"temperature is -1"):
        task.generate("x", temperature=-1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.path", "nowhere/*.txt"], "nowhere"),
        (["--model.net.num_heads", 3], "width 16 is not divisible by num_heads 3"),
        (["--data.context_length", 100_000], "the train split has"),
        (["--data.batch_size", 32_000, "--data.micro_batch_size", 16], "fewer than one step"),
        (
            ["--data.tokenizer", f"{LM}.Pretrained", "--data.tokenizer.path", "./none"],
            "./none",
        ),
    ],
)
def test_bad_input_is_refused_before_a_run_begins(folder, flags, message, capsys):
    before = runs()
    with pytest.raises(SystemExit):
        main(words(*flags))
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert runs() == before


def test_stop_is_one_text_or_a_list(straight, folder, capsys):
    """In bytes, where each token is a letter: never the letters of a longer text."""
    prompt = ["--prompt=def ", "--temperature=2", "--seed=1", "--max_new_tokens=60"]
    main(["generate", str(straight), *prompt])
    whole = capsys.readouterr().out.removesuffix("\n")
    first = next(character for character in whole[14:] if character.isascii() and character.isalpha())
    for given in (first, json.dumps([first])):
        main(["generate", str(straight), *prompt, f"--stop={given}"])
        assert capsys.readouterr().out.removesuffix("\n") == "def " + whole[4:].partition(first)[0]
    for given, message in (("the", "stop: 'the' is 3 tokens"), ("[1]", "stop: 1 is not text")):
        with pytest.raises(SystemExit):
            main(["generate", str(straight), *prompt, f"--stop={given}"])
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_vocabulary_or_changed_text_is_refused(straight, folder, capsys):
    run = folder / "changed"
    shutil.copytree(straight, run)
    with pytest.raises(SystemExit):
        main(["fit", "--resume", str(run), "--data.tokenizer", f"{LM}.Characters"])
    assert "another architecture or vocabulary" in capsys.readouterr().err
    (folder / "text2").mkdir()
    for path in (folder / "text").iterdir():
        (folder / "text2" / path.name).write_text(path.read_text() + "\n# changed\n")
    with pytest.raises(SystemExit):
        main(["fit", "--resume", str(run), "--data.path", "text2"])
    assert "not those that the checkpoint was trained on" in capsys.readouterr().err


def test_an_unprepared_data_module_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    with pytest.raises(ValueError, match="not prepared"):
        TextData(str(tmp_path / "a.txt"), split=ContiguousSplit(val=0.1), cache_dir=str(tmp_path)).setup()
