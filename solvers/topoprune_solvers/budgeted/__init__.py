"""Algorithms for exactly k units (problem B)."""
