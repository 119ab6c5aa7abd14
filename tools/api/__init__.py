"""A client of ComfyUI's API, and workflow files as its prompts."""
