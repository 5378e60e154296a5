"""Measurements behind the figures in the README; each module is one command."""
