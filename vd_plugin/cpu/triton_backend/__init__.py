"""Triton backend "cpu" (entry point group `triton.backends`): enough of a backend for Triton's interpreter."""
