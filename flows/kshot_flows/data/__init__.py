"""Versions of the data sets."""
