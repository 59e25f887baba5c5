"""Move messages between this program and its kernels; never interpret them."""
