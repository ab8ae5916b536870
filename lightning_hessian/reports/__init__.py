"""What is read back: run histories."""
