"""Hydra configurations of the recipes, importable as `pkg://lightning_easyscale.conf`."""
