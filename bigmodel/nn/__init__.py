"""Plain torch modules, usable without the rest of bigmodel."""

from bigmodel.nn.attention import KVCache
from bigmodel.nn.cnn import CNN
from bigmodel.nn.convnext import ConvNeXt
from bigmodel.nn.drop_path import DropPath
from bigmodel.nn.loss import cross_entropy_sum
from bigmodel.nn.mlp import MLP
from bigmodel.nn.resnet import ResNet
from bigmodel.nn.transformer import GPT
from bigmodel.nn.vgg import VGG
from bigmodel.nn.vit import ViT

__all__ = ["CNN", "GPT", "MLP", "VGG", "ConvNeXt", "DropPath", "KVCache", "ResNet", "ViT", "cross_entropy_sum"]
