"""Exact data state: which batches an EST has consumed and how to continue after them."""
