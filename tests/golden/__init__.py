"""Outputs recorded on an H100: `record` makes them, `cases` names them, `tests/test_golden.py` holds the model to them."""
