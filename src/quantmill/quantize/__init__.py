"""The making lane: calibration text to solved, packed model folders."""
