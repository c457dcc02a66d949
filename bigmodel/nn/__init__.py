"""Plain torch modules, usable without the rest of bigmodel."""

from bigmodel.nn.attention import KVCache
from bigmodel.nn.bert4rec import BERT4Rec
from bigmodel.nn.cnn import CNN
from bigmodel.nn.convnext import ConvNeXt
from bigmodel.nn.drop_path import DropPath
from bigmodel.nn.esasrec import ESASRec
from bigmodel.nn.gru4rec import GRU4Rec
from bigmodel.nn.hstu import HSTU
from bigmodel.nn.loss import cross_entropy_sum
from bigmodel.nn.matrix_factorization import MatrixFactorization
from bigmodel.nn.memory_format import guard_convolutions, to_channels_last
from bigmodel.nn.mlp import MLP
from bigmodel.nn.resnet import ResNet
from bigmodel.nn.sasrec import SASRec
from bigmodel.nn.transformer import GPT
from bigmodel.nn.two_tower import TwoTower
from bigmodel.nn.vgg import VGG
from bigmodel.nn.vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "HSTU",
    "MLP",
    "VGG",
    "BERT4Rec",
    "ConvNeXt",
    "DropPath",
    "ESASRec",
    "GRU4Rec",
    "KVCache",
    "MatrixFactorization",
    "ResNet",
    "SASRec",
    "TwoTower",
    "ViT",
    "cross_entropy_sum",
    "guard_convolutions",
    "to_channels_last",
]
