"""The small demo model: its world of drawn scenes, its weights, its training and its evaluation."""
