"""Jobs: rows before a call returns, run one after another on the worker group."""
