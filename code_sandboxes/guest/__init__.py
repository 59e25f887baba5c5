"""What runs in the kernel: standard library only, Python 3.9 syntax, sent or run there as it is."""
