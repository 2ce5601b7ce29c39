"""What vLLM 0.32 lacks to run its second model runner on a machine without a GPU. Idle everywhere else.

* `bootstrap` acts in every Python process of the environment (engine processes are spawned) through a `.pth` file.
* `interpreter` patches what keeps Triton's interpreter from running one of those kernels.
* `kernels` runs numpy in place of the kernels that would dominate a step there.
* `triton_backend` is an out-of-tree Triton backend named "cpu", over which Triton's interpreter runs vLLM's kernels.
"""
