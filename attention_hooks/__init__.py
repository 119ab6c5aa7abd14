"""Attention control: what a source pass captures, and what a target pass does with it.

An edit goes like this. `run.AttentionRun` (the only file that knows ComfyUI's samplers) binds the chained controls to the
model and to the steps that will run. Controls declare edits (`edits.py`): for a step, a layer and a branch, which of
the target's q, k, v or features are taken from which source branch. What the source pass has to capture follows from that.
Before a step the source pass fills the `store.AttentionStore`, several steps at once; `patches.py` captures and injects;
`attend.py` is the arithmetic. No self-attention matrix is ever made.
"""
