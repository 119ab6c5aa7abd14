"""Inversion methods, semantic guidance and the LEDITS update."""
