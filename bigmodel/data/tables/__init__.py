"""Table readers: find files, read them block by block, and report errors with file and row.

CSV, TSV, JSON Lines and Parquet; and datasets of Hugging Face's `datasets`, in `bigmodel.data.tables.hugging_face`::

    class Weather:
        def select_columns(self, where, available):  # the columns to read, by role; see `ColumnSelector`
            return find_columns(where, available, {"day": ("day", "date"), "degrees": ("degrees",)})

    for file in find_files(path, partial(files_in, suffixes=(".csv", ".parquet")), "tables of weather (CSV, Parquet)"):
        for rows in read_table(file, Weather()):
            degrees = rows.columns["degrees"]  # an Arrow array; of CSV and TSV, text. rows.name(3): weather.csv row 4

This package imports neither torch nor Lightning.
"""

from bigmodel.data.tables.files import files_in, find_files
from bigmodel.data.tables.rows import ColumnSelector, Rows, find_columns
from bigmodel.data.tables.text import read_table

__all__ = ["ColumnSelector", "Rows", "files_in", "find_columns", "find_files", "read_table"]
