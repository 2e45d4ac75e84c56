"""Checkers, statistics and reports: how good the answers of a model are, with intervals."""
