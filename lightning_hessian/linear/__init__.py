"""The ground: symmetric operators, vectors in shards, ranks, memory, random numbers."""
