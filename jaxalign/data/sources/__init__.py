"""One file for every published set whose rows need more than their keys to be understood."""
