"""Benchmarks against torch peers. `README.md` beside this file says how to run them and what is fair.

The parent scripts (`sft`, `generate`, `compile`) need the standard library and numpy only. Every contender
is a process of its own (`worker`), so that jax and torch may come from different interpreters.
"""
