"""Conformance tests of a task, `bigmodel check-task`; usable from an outsider's own tests."""
