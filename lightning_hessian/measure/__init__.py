"""What can be measured in a module, and the functions that measure it."""
