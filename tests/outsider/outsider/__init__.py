"""Tabular regression: a small task of another package, which uses only public names of bigmodel."""

from outsider.data import Rows, TableData
from outsider.module import MLP, TabularRegression

__all__ = ["MLP", "Rows", "TableData", "TabularRegression"]
