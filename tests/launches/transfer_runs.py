"""Tiny pretrained nets, data for them, and runs of them; as a program, the runs of two processes, in one launch:
`python forked.py 2 transfer_runs.py`, in a folder that `make` has filled."""

import random
from pathlib import Path

import torch

from bigmodel.cli import main

TASK = "bigmodel.tasks.transfer_learning"
GROUPS = {
    "food": ["bread", "soup", "rice", "cake"],
    "sky": ["cloud", "star", "moon", "rain"],
    "tool": ["saw", "nail", "axe"],
}
FILLING = ["the", "a", "is", "was", "here", "there", "good", "old", "my", "your"]


def texts(path, number=96, seed=0):
    """Write a table of texts, each with words of its class and other words."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        file.write("text,label\n")
        for i in range(number):
            name = list(GROUPS)[i % 3]
            some = [*draw.sample(GROUPS[name], 2), *draw.choices(FILLING, k=draw.randint(1, 9))]
            draw.shuffle(some)
            file.write(f"{' '.join(some)} {i},{name}\n")


def bert(folder, layers=2, dropout=0.0):
    """Save a tiny encoder in the format of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLING, *(word for some in GROUPS.values() for word in some)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(known), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def make(folder, dropout=0.0):
    """Write texts, a backbone, and an experiment of 8 steps of 16 over two epochs, validated each epoch."""
    folder = Path(folder)
    texts(folder / "texts.csv")
    bert(folder / "bert", dropout=dropout)
    (folder / "texts.yaml").write_text(
        f"""\
model:
  class_path: {TASK}.TransferLearning
  init_args:
    backbone: bert
    dropout: {dropout}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.5}}}}
data:
  class_path: {TASK}.LabelledTextData
  init_args: {{path: texts.csv, batch_size: 16, cache_dir: cache, split: {{val: 0.2, test: 0.1}}}}
trainer: {{max_epochs: 2, accelerator: cpu, precision: 32-true, log_every_n_steps: 1}}
callbacks:
  progress: null
  last: {{init_args: {{every_n_steps: 1, every_n_minutes: null, keep: -1}}}}
"""
    )


def words(*flags, runs_dir="runs"):
    """Arguments of `bigmodel fit`."""
    return [str(word) for word in ("fit", "-c", "texts.yaml", "--runs_dir", runs_dir, *flags)]


# Runs with equal results on one process and on two.
RUNS = {
    "full": ["--model.layer_decay", 0.7, "--model.penalty", f"{TASK}.L2SPPenalty", "--model.penalty.strength", 0.1],
    "gradual": ["--model.method", "gradual"],
    "knn_probe": ["--model.method", "knn_probe", "--model.method.k", 5],
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.micro_batch_size", "4")
    for name, flags in RUNS.items():
        main(words(*flags, "--model.backbone", "plain", "--model.dropout", 0.0, *two, runs_dir=f"two-{name}"))
