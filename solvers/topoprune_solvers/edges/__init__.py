"""Algorithms for edge selection (problem D)."""
