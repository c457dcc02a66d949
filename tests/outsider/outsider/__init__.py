"""Tabular regression: the smallest task that is not language, with nothing that is private to bigmodel."""

from outsider.data import Rows, TableData
from outsider.module import MLP, TabularRegression

__all__ = ["MLP", "Rows", "TableData", "TabularRegression"]
