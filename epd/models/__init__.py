"""Models: what a checkpoint says (`card`), the decoder, the vision encoder, and a tiny fake.

`card`, `files`, `text_config` and `revision` import no torch; the rest is reached through
`registry`, which imports only the half (decoder or vision) that a worker hosts.
"""
