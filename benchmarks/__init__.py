"""Every measured number of the README and docs comes from a command here: ``python -m benchmarks --help``."""
