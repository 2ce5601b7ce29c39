"""`make bench`: stock vLLM, VisionDrop and the limit side by side. `__main__.py` is the command."""
