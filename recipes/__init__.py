"""Runnable experiments: each writes raw results, figures and a report."""
