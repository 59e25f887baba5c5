"""What runs in the process of a contestant: one module for each, all with the same actions."""
