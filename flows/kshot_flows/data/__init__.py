"""Versioning of data sets with DVC."""
