"""Weights out: timm, transformers and torch.hub, with a model card."""
