"""Attacks on a model and defences of it, with what is said in files: attacks, search, defences, verdicts,
rounds."""
