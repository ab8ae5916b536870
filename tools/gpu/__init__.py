"""What is checked and measured on a card; `gpu_check.py` and `gpu_bench.py` run it."""
