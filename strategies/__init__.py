"""Tuning strategies: which trial comes next. One module each, found by name through the entry points."""
