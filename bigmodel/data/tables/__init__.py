"""Readers of tables: found at a path, read block by block, with errors that name file and row.

CSV, TSV, JSON Lines and Parquet; and the data sets of Hugging Face's `datasets`, in
`bigmodel.data.tables.hugging_face`::

    class Weather:
        def found(self, where, there):  # the columns to read, by role; see `Columns`
            return find_columns(where, there, {"day": ("day", "date"), "degrees": ("degrees",)})

    for file in find_files(path, partial(files_in, suffixes=(".csv", ".parquet")), "tables of weather (CSV, Parquet)"):
        for rows in read_table(file, Weather()):
            degrees = rows.columns["degrees"]  # an Arrow array; of CSV and TSV, text. rows.name(3): weather.csv row 4

This package imports neither torch nor Lightning.
"""

from bigmodel.data.tables.files import files_in, find_files
from bigmodel.data.tables.rows import Columns, Rows, find_columns
from bigmodel.data.tables.text import read_table

__all__ = ["Columns", "Rows", "files_in", "find_columns", "find_files", "read_table"]
