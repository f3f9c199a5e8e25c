"""How values are stored: packed integers, fp8, locations in tensors, headers of safetensors files."""
