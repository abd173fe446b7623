"""Merging checkpoints: merge.py's work. source → schedule → slerp → stream → report; mergekit_yaml and tune beside it."""
