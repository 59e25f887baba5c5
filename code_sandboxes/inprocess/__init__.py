"""A kernel in this process: it speaks the messages of any other kernel, and runs code with ``exec()``."""
