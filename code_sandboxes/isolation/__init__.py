"""What keeps the code of a sandbox away from the machine it runs on (Linux)."""
