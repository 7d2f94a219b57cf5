"""quantmill: make, check, publish, fetch and run GPTQ-quantised language models."""

__version__ = "0.1.0"
