"""Language models: what the teacher writes, what the student writes, an average of the student as its teacher."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from distillation import LM, ON_POLICY, OURS, of_text
from lightning.pytorch import Callback

import bigmodel
from bigmodel.cli import main
from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.distillation import OnPolicy
from bigmodel.tasks.language_modeling import TextBatch
from bigmodel.training.callbacks import TrainingLog
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.callbacks.training_log import _FlopCounter

T = 16


def fit(runs_dir, task="model", width=16, **settings):
    main(of_text(runs_dir, task, width, **settings))
    (record,) = Path(runs_dir).glob("**/run.json")
    return record.parent


@pytest.fixture
def folder(school, monkeypatch):
    monkeypatch.chdir(school)
    return school


WRITE = ["generate", "teacher-run", "--documents", "50", "--prompt_tokens", "4", "--max_new_tokens", "40"]


def test_a_student_is_trained_on_what_the_teacher_wrote(folder, capsys, monkeypatch):
    main([*WRITE, "--out", "written"])
    files = sorted(Path("written").glob("*.txt"))
    texts = [file.read_text() for file in files]
    facts = json.loads(Path("written/generated.json").read_text())
    assert len(files) == 50
    assert facts.pop("weights")
    assert facts == {"documents": 50, "seed": 0, "prompt_tokens": 4, "max_new_tokens": 40}
    assert {path.suffix for path in Path("written").iterdir()} == {".txt", ".json"}

    teacher, data = bigmodel.load("teacher-run"), bigmodel.run.load_data("teacher-run")
    starts = data.prompts(range(50), 0)
    num_train = len(data.plan.splits["train"])
    assert len(set(starts)) == len(set(starts[:num_train])) == num_train, "of all documents, and then again"
    prompts = [teacher.tokenizer.decode(teacher.tokenizer.encode(text)[:4]) for text in starts]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    keys = sample_keys(0, 0, torch.arange(50))
    other_batch = teacher.write_documents(starts, keys, prompt_tokens=4, max_new_tokens=40)
    assert [text for text, _ in other_batch] == texts
    cut = sum(not ended for _, ended in other_batch)
    assert 0 < cut < 50
    assert f"{cut} met --max_new_tokens before their end" in capsys.readouterr().err

    run = fit("sequence", data__path="written", data__tokenizer=f"{LM}.FromRun", data__tokenizer__run="teacher-run")
    assert bigmodel.load(run).label_space == teacher.label_space
    main(["validate", str(run), "--data.path", "text"])
    assert json.loads((run / "validate.json").read_text())["val/loss"] > 0

    # Interrupted, it goes on: what was there is not written again.
    monkeypatch.setattr(type(teacher), "write_documents", interrupted(type(teacher).write_documents, calls := []))
    with pytest.raises(SystemExit):
        main([*WRITE, "--out", "again"])
    assert not Path("again").exists()
    assert len(list(Path(".again.partial").glob("*.txt"))) == 32
    with pytest.raises(SystemExit):
        main([*WRITE, "--out", "again", "--temperature", "0.5"])
    assert "was begun with other temperature: give the same flags" in capsys.readouterr().err
    main([*WRITE, "--out", "again"])
    assert len(calls) == 3
    assert [Path("again", file.name).read_text() for file in files] == texts


def interrupted(method, calls):
    """The method, whose second call ends in Ctrl-C; its calls are counted."""

    @functools.wraps(method)
    def call(*args, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return method(*args, **options)

    return call


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--documents", "0", "--out", "new"], "--documents 0: a whole number of at least 1 is needed"),
        (["--documents", "5"], "--out is needed"),
        (["--documents", "5", "--out", "text"], "--out text is there already"),
        (["--documents", "5", "--out", "new", "--beam", "3"], "no flag --beam; writing documents takes --documents"),
    ],
)
def test_documents_are_refused_in_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["generate", "teacher-run", *flags])
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def distill(runs_dir, **settings):
    model = {"model": f"{OURS}.Distillation", "model__teacher": "teacher-run"}
    return fit(runs_dir, "model.student", **{**model, **settings})


WATCHED = {**ON_POLICY, "callbacks__witness": f"{__name__}.Witness"}
MEAN = {"model__teacher": f"{OURS}.MeanTeacher", "model__teacher__decay": 0.8}


class Witness(Callback):
    """Sees to it that the student writes what it should, and that the loss of that is GKD's."""

    written: list[int] = []  # noqa: RUF012  # steps of all runs

    def on_train_start(self, trainer, pl_module):
        sample = pl_module.student.sample_on_policy

        def watch(batch, keys, **options):
            new = sample(batch, keys, **options)
            assert torch.equal(keys, sample_keys(0, trainer.global_step, batch.index))
            assert torch.equal(new.tokens[:, :7], batch.tokens[:, :7])
            assert (new.targets[:, :6] == -100).all()
            assert torch.equal(new.targets[:, 6:-1], new.tokens[:, 7:])
            assert not torch.equal(new.tokens, batch.tokens)
            self.new, self.expected = new, None
            if not pl_module.net.dropout.p:
                p, q = (task.net(new.tokens)[:, 6:].softmax(-1) for task in (self.teacher, pl_module))
                halves = [(x * (x / (p / 2 + q / 2)).log()).sum() / 2 for x in (p, q)]
                self.expected = halves[0] + halves[1]
            return new

        pl_module.student.sample_on_policy = watch
        self.new, self.expected, (self.teacher,) = None, None, pl_module.teacher_outputs.teachers.tasks

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.new is None:
            assert outputs["count"] == batch.targets.numel()
            return
        self.written.append(trainer.global_step - 1)
        assert outputs["count"] == 10 * len(self.new.tokens)
        if self.expected is not None:
            torch.testing.assert_close(outputs["loss"] * trainer.accumulate_grad_batches, self.expected)
        if trainer.global_step <= 1 and len(pl_module.terms) == 1:  # MFU counts what is learned, not the writing
            with _FlopCounter() as counter:
                logits = pl_module.logits(pl_module.features(self.new)[:, 6:])
                torch.autograd.grad(logits.sum(), list(pl_module.net.parameters()))
            assert get_callback(trainer, TrainingLog)._flops == counter.flops
        self.new = None


def test_on_policy_steps_resume_bitwise(folder):
    """Statement (23). Half of the steps are on what the student wrote, with dropout in the others and in these."""
    straight = distill("on-policy", **WATCHED)
    chosen = [step for step in range(6) if OnPolicy(0.5, 10).is_on_policy(step)]
    assert Witness.written == chosen
    assert 0 < len(chosen) < 6
    resumed = stopped_at_3(straight)
    main(["fit", "--resume", str(resumed)])
    assert Witness.written == chosen + [step for step in chosen if step >= 3]
    same(state(resumed)["state_dict"], state(straight)["state_dict"])
    micro = distill("on-policy-micro", data__micro_batch_size=4, model__student__net__dropout=0, **WATCHED)
    whole = distill("on-policy-whole", model__student__net__dropout=0, **WATCHED)
    for name, tensor in state(whole)["state_dict"].items():
        torch.testing.assert_close(state(micro)["state_dict"][name], tensor, rtol=0, atol=1e-5)


def state(run, step=6):
    return torch.load(run / "checkpoints" / f"last-{step}.ckpt", weights_only=True)


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def stopped_at_3(run):
    """A copy of a run, as if it had been stopped there."""
    stopped = run.with_name("stopped")
    shutil.copytree(run, stopped)
    for file in (stopped / "checkpoints").iterdir():
        if file.name != "last-3.ckpt":
            file.unlink()
    return stopped


def test_no_gradient_goes_through_what_is_drawn(folder):
    """And a step under autocast has the gradient that it has on the same tokens from the data."""
    task = bigmodel.load("teacher-run").train()
    keys = sample_keys(0, 0, torch.arange(4))
    tokens = torch.randint(300, (4, T), generator=torch.Generator().manual_seed(0))
    batch = TextBatch(tokens, tokens.roll(-1, 1), torch.arange(4), torch.ones(4))
    gradients = []
    for _ in range(2):
        task.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if not gradients:
                batch = task.sample_on_policy(batch, keys, max_new_tokens=T, temperature=1.0)
            assert not batch.tokens.requires_grad
            assert task.net.training
            torch.manual_seed(0)
            task.training_step(batch)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in task.named_parameters()})
    same(*gradients)
    assert (batch.targets != -100).all()
    again = task.sample_on_policy(batch, keys, max_new_tokens=T, temperature=1.0)
    assert again.tokens[:, 0].equal(batch.tokens[:, 0])
    with pytest.raises(ValueError, match="max_new_tokens 17: of sequences of 16 tokens, 1 to 16"):
        task.sample_on_policy(batch, keys, max_new_tokens=T + 1, temperature=1.0)


def test_a_mean_teacher_is_its_closed_form_and_resumes_bitwise(folder):
    run = distill("mean", callbacks__last__every_n_steps=1, **MEAN)
    assert bigmodel.load(run).label_space == bigmodel.load("teacher-run").label_space
    states = [state(run, step) for step in range(1, 7)]
    averages = [saved["callbacks"]["MeanTeacher"]["average"] for saved in states]
    for name in averages[0]:
        expected = averages[0][name]
        for saved, average in zip(states[1:], averages[1:], strict=True):
            expected = 0.8 * expected + 0.2 * saved["state_dict"][name]
            torch.testing.assert_close(average[name], expected, rtol=0, atol=1e-6)
    assert not any(name.startswith("distillation") for name in states[-1]["state_dict"])
    resumed = stopped_at_3(run)
    main(["fit", "--resume", str(resumed)])
    same(state(resumed)["state_dict"], states[-1]["state_dict"])
    same(state(resumed)["callbacks"]["MeanTeacher"]["average"], averages[-1])
    main(["validate", str(run)])
    hint = {"hint": f"{OURS}.Hint", "hint__teacher": "blocks.0", "hint__weight": 0}
    terms = {f"model__losses__{key}": value for key, value in hint.items()}
    distill(
        "all-together", model__student__net__dropout=0, **terms, **{**WATCHED, "model__teacher": MEAN["model__teacher"]}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**WATCHED, "model__on_policy__share": 0}, "--model.on_policy.share 0.0 must lie in 0 < share <= 1"),
        (
            {**WATCHED, "model__on_policy__max_new_tokens": 17},
            "--model.on_policy.max_new_tokens 17 must be 1 to 16",
        ),
        (
            {**WATCHED, "model__cache": f"{OURS}.TeacherCache"},
            "--model.on_policy generates new tokens",
        ),
        ({**WATCHED, "model__losses__dkd": f"{OURS}.DKD"}, "set --model.losses to GeneralizedJSD or KD, without DKD"),
        ({**MEAN, "model__teacher__decay": 1}, "--model.teacher.decay 1.0 must lie in 0 <= decay < 1"),
        (
            {"model__teacher": f"{OURS}.MeanTeacher", "model__cache": f"{OURS}.TeacherCache"},
            "a MeanTeacher changes in each step",
        ),
        (
            {**MEAN, "trainer__strategy": "bigmodel.parallel.ShardedStrategy"},
            "--model.teacher MeanTeacher averages",
        ),
    ],
)
def test_bad_input_is_one_line_before_the_first_step(folder, capsys, settings, message):
    with pytest.raises(SystemExit):
        distill("refused", **settings)
    assert message in capsys.readouterr().err
