"""What pruning costs in answers and what it saves: `epd eval` and `epd calibrate`."""
