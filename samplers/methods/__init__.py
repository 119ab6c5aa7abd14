"""The papers' formulas, on tensors and plain callables. Nothing here imports comfy."""
