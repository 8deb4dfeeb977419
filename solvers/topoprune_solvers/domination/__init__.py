"""Algorithms for dominating sets (problem A), on set-cover instances."""
