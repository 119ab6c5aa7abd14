"""Measuring edits as PIE-Bench does: the metrics (`metrics.py`) and the networks that they need (`networks.py`)."""
