"""The process: its settings, what it is made of, how it starts and ends."""
