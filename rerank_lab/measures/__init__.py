"""Measures the quality of rankings, and tests whether the difference between two is more than chance."""
