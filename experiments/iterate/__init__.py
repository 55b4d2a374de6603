"""The interleaved method: rank, drop a few filters, train a little, repeat."""
