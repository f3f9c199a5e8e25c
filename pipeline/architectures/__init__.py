"""Model families: the names of their matrices, fused layouts, stacked experts and the keys of their configs."""
