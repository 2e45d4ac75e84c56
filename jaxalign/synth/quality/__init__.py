"""Filters of rows: each says which rows it leaves out, and why."""
