"""Accuracy with intervals, calibration, open-set recognition and verification, on seeded episodes."""
