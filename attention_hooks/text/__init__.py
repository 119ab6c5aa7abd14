"""Words: tokens of a prompt, their alignment, edit directions."""
