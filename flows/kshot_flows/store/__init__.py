"""Reuse of results: the products of steps, their cache keys, and their storage."""
