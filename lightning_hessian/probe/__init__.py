"""What is measured: a module and some batches become a function of the parameters."""
