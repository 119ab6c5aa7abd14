"""Kinds of networks: their blocks, where tokens lie, how to reach them."""
