"""Which package of Python's standard library a piece of source code comes from."""
