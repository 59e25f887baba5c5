"""Servers that have kernels: what is asked of them by HTTP, and their kernels as this program sees them."""
