"""What runs in the kernel: standard library only, Python 3.9 syntax, never imported by the host."""
