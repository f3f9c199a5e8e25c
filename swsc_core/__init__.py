"""SWSC (arXiv 2501.08631): shared weights for similar channels, compensated by a truncated SVD.

Pure PyTorch: one matrix in, one compressed matrix out. No Ray, no files, no logging, no global random state, and no
choice of device: everything runs on the device of the given tensor.
"""

from swsc_core.compressed.codec import Encoded, decode, encode
from swsc_core.compressed.entry import Entry, RtnEntry, SwscEntry
from swsc_core.layers.experts import SwscExperts
from swsc_core.layers.linear import SwscEmbedding, SwscJoined, SwscLinear
from swsc_core.method.compress import compress
from swsc_core.method.kmeans import KMeansResult, kmeans
from swsc_core.method.metric import Metric
from swsc_core.method.rtn import RtnMatrix, dequantize, quantize
from swsc_core.method.spec import RtnSpec, Spec, SwscSpec
from swsc_core.method.svd import LowRank, truncated_svd
from swsc_core.method.swsc_matrix import SwscMatrix, restore
from swsc_core.storage.alignment import align, aligned

__all__ = [
    "Encoded",
    "Entry",
    "KMeansResult",
    "LowRank",
    "Metric",
    "RtnEntry",
    "RtnMatrix",
    "RtnSpec",
    "Spec",
    "SwscEmbedding",
    "SwscEntry",
    "SwscExperts",
    "SwscJoined",
    "SwscLinear",
    "SwscMatrix",
    "SwscSpec",
    "align",
    "aligned",
    "compress",
    "decode",
    "dequantize",
    "encode",
    "kmeans",
    "quantize",
    "restore",
    "truncated_svd",
]
