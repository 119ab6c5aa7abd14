"""The methods in their papers' words, slow and plain: what the tests hold the pack against. Nothing of the pack is used."""
