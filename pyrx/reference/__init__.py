"""Every op in plain PyTorch: its definition, the oracle of the tests, and the fallback where nothing is built."""
