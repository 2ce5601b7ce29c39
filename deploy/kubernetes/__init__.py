"""Manifests for Kubernetes, and the code that writes those of them that repeat other files."""
