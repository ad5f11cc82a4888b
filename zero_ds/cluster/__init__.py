"""Runs on many machines: naming, reaching and checking them, and starting, stopping and restarting ranks."""
