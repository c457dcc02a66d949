"""Conformance tests of a task, for `bigmodel check-task`; also usable in other packages' tests."""
