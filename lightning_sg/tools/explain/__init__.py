"""Explains an error of this package: what caused it, and what to do."""
