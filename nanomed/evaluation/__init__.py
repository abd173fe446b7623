"""Evaluation: one module per command of eval.py, and the statistics, tasks and records that they share."""
