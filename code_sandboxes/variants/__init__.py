"""Where the kernels of a sandbox run: how they are started, interrupted, watched and ended."""
