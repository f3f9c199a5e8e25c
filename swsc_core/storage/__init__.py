"""How values are stored: packed integers, fp8, locations of matrices in tensors, headers of safetensors files."""
