"""How good a ranking is, and whether a difference between two is more than chance."""
