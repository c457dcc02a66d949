"""Tables of any common kind: found at a path, read block by block, and what cannot be used told by file and row.

CSV, TSV, JSON Lines and Parquet; and the data sets of Hugging Face's `datasets`, in `bigmodel.data.tables.hugging_face`::

    class Weather:
        def found(self, where, there):  # which columns are read, and as what; see `Columns`
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
