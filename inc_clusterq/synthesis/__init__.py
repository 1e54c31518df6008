"""Synthetic calibration data from a trained network alone: ClusterQ (arXiv 2205.00179)."""
