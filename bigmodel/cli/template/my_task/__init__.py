"""Which package of Python's standard library a piece of source code comes from."""

from my_task.data import MyTaskData, Piece
from my_task.module import MyTask, NGrams

__all__ = ["MyTask", "MyTaskData", "NGrams", "Piece"]
