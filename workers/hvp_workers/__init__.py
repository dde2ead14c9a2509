"""Worker groups: processes that hold a model in shards and compute in step."""
