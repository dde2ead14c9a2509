"""Uploads that resume; their methods are BlobService's."""
