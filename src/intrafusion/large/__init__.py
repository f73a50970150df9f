"""Networks larger than memory: a folder of sharded weights made smaller block by block."""
