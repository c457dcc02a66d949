"""The tasks that come with bigmodel, one folder each. None imports another."""
