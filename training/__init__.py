"""Training of the demo model: see README.md beside this file."""
