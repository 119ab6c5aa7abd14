"""Saving and loading: tensor files, the formats of inversions and attention stores, safe places."""
