"""Modules whose parameters are distributed: FSDP1, FSDP2 and tensor parallelism."""
