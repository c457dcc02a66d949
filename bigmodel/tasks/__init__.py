"""The tasks that are included in bigmodel, one folder each. None imports another."""
