"""Optimisers, the gradient step, checkpoints, metrics, the loop, and whole runs."""
