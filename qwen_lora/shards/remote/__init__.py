"""Shard sets behind a URL: protocols (`base`), and how one of them becomes a store (`store`)."""
