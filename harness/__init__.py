"""Compare LLM inference optimizations fairly: one protocol, one record per run, tables from records only."""

__version__ = "0.1.0"
