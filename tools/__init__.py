"""For developers; not part of the published package. `python dev.py` runs what is here."""
