"""The command line. Its grammar is read without importing torch."""
