"""The SDK for code that waits: made of `hvp_client.awaited` by `make sdk`, but for a few files.

By hand are `portal.py`, the thread on which coroutines run; `twins.py`, what all blocking handles
share; and `protocols.py`, what numpy and SciPy ask of them.
"""
