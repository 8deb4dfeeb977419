"""Algorithms for layer budgets (problem E)."""
