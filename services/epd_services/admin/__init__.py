"""The operators' door: an HTTP API on a loopback port of its own, with a token of its own."""
