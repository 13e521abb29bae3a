"""Backbones and what is trained in them."""
