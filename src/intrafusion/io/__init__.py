"""Saving, loading and reading files."""
