"""`make gpu`: what to find out first on a machine with an NVIDIA GPU, as one command that logs each step and goes on.

`step.py` says what a step and its outcome are, `plan.py` which steps there are and in which order, `hour.py` runs them,
`report.py` prints them, `machine.py` finds GPUs and tools, `processes.py` runs programs within a time limit. Each step
is a program of its own, a function of `checks.py`; what these use to serve a model, ask it and read its log is in
`server.py`, `questions.py`, `engine_log.py` and `kept.py`. docs/gpu.md is for whoever runs it.
"""
