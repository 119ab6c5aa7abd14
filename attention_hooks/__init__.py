"""Attention control: what a source pass captures, and what a target pass does with it.

A run goes like this (`run.py`). The chained controls are bound to the model and the steps that will run; for a step, a
layer and a branch they declare which of the target's q, k, v or features are taken from which source branch (`edits.py`).
The plan asks them once and knows what has to be read (`plan.py`). Before a step the source pass captures that into the
`store.AttentionStore`, several steps at once (`source_pass.py`); the target pass injects it (`target_pass.py`).
`attend.py` is the arithmetic: no self-attention matrix is ever made. `backbones/` knows the kind of network.
"""
