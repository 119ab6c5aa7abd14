"""The small demo model: its world of drawn scenes and its weights. Training and evaluation are in tools/training."""
