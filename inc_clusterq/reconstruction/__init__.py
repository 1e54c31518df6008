"""MRECG: joint reconstruction of modules on a prepared graph (arXiv 2303.11906)."""
