"""Checkpoints: folders of hard links to blobs, and rows of what they hold."""
