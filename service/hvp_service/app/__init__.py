"""The server process: its settings, its parts, its start and its end."""
