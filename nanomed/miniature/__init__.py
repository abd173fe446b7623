"""The paper in miniature: `python -m nanomed.miniature` (see __main__.py)."""
