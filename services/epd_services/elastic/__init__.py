"""Stage balance: how many workers encode, prefill and decode, decided from what is measured."""
