"""Merging checkpoints, merge.py's work: source → checks (architecture, same_tokenizer) → schedule → slerp →
stream → write → verify → report.

mergekit_yaml reads and writes mergekit's configurations; tune searches t with the losses of losses.py.
"""
