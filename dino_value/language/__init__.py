"""The same value core on continued pretraining of a causal language model (method section 4).

The designer φ replaces the one-hot next token by a soft target on a few candidates; a small feedback set says, through
g_down, which targets are valuable.
"""
