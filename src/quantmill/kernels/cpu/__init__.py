"""GPTQ on a processor through numba: no C compiler, no torch inside."""
