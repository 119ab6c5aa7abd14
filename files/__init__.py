"""What is saved and loaded: tensor files, the formats of inversions and attention stores, safe places."""
