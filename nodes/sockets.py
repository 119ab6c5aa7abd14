"""The pack's own wire types."""

from comfy_api.latest import io

Inversion = io.Custom("LEDITS_INVERSION")
Concepts = io.Custom("LEDITS_CONCEPTS")
Attention = io.Custom("LEDITS_ATTENTION")
Prompts = io.Custom("LEDITS_PROMPTS")
Store = io.Custom("LEDITS_STORE")

OBSERVED = "ledits_attention"  # entry of a LATENT: the `attention_hooks.observed.Observed` of the run that made it
