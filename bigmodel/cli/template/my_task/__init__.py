"""Classification of source code by the package of Python's standard library that it is from."""
