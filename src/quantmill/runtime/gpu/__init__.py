"""The fused decoder on an NVIDIA GPU. Importing this loads neither torch nor triton."""
