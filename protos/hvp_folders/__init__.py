"""Rules for the folders of checkpoints, which client, service and ranks share.

Standard library only. A rule that stands here is decided once: the same folder has the same files
and the same refusal whoever looks at it.
"""
