"""What Triton compiles for the decoder, apart from the linears. `twins.py` beside it says the same in torch."""
