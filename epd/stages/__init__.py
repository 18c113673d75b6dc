"""What each stage does with its messages; sockets and processes live elsewhere."""
