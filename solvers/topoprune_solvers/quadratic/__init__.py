"""Algorithms for quadratic subsets (problem C)."""
