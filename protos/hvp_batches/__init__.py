"""The description of a batch for a model, which SDK, service and ranks share.

Standard library and numpy alone. Whether a batch fits a model is decided here, so that the refusal
and its words are the same whoever looks.
"""
