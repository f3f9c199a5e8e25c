"""Model families: names of their matrices, fused layouts, stacked experts, keys of their configs."""
