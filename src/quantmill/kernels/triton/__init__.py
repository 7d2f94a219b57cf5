"""The linears on a GPU, in Triton: words of codes laid out for tensor cores. Importing this loads no triton."""
