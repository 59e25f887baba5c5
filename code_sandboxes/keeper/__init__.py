"""The process that owns the kernels of this machine, and the way programs speak with it."""
