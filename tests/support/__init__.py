"""Models, prompts, paths and servers that tests work with."""
