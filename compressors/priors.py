"""What each method is expected to cost in quality, before anything was measured. Torch-free.

Priors: perplexity ratio, KL, top-1 agreement. Measured with these methods on a small trained
Llama (17M parameters, the bundled model; 48 windows of 512 tokens of held-out text, 16 for width,
SparseGPT, 4:8 and 50 %), which is the hard case: larger models lose less. The order of methods
agrees with the published one (GPTQ arXiv:2210.17323 table 3, HQQ blog table 1, Wanda
arXiv:2306.11695 table 3, SVD-LLM arXiv:2403.07378 table 1, ShortGPT arXiv:2403.03853 table 2).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quality:
    """Against the dense model: perplexity ratio, KL (nats), top-1 agreement."""

    perplexity_ratio: float
    kl_nats: float
    top1_agreement: float


RTN = {
    8: Quality(1.0004, 0.0004, 0.989),
    4: Quality(1.055, 0.072, 0.872),
    3: Quality(1.335, 0.372, 0.717),
    2: Quality(19.4, 3.19, 0.193),
}
HQQ = {
    8: Quality(1.0004, 0.0004, 0.989),
    4: Quality(1.043, 0.063, 0.879),
    3: Quality(1.183, 0.245, 0.770),
    2: Quality(2.69, 1.196, 0.496),
}
GPTQ = {
    8: Quality(1.0001, 0.0002, 0.993),
    4: Quality(1.023, 0.043, 0.899),
    3: Quality(1.115, 0.165, 0.814),
    2: Quality(1.77, 0.749, 0.605),
}
# On 16 windows, each layer from the dense model's inputs.
AWQ = {
    4: Quality(1.033, 0.053, 0.891),
    3: Quality(1.167, 0.204, 0.782),
    2: Quality(2.19, 0.983, 0.546),
}
ROT = {
    4: Quality(1.025, 0.039, 0.904),
    3: Quality(1.095, 0.153, 0.813),
    2: Quality(1.70, 0.699, 0.616),
}
# By the bits computed with: the child is plain GPTQ.
NESTED = {
    8: Quality(1.0001, 0.0009, 0.982),
    4: Quality(1.023, 0.043, 0.899),
}
QAT = {
    3: Quality(1.058, 0.150, 0.814),
    2: Quality(1.38, 0.550, 0.655),
}
# Symmetric: the range that a zero point would save costs more than GPTQ gains below four bits.
AUTOGPTQ = {
    8: Quality(1.0002, 0.0002, 0.992),
    4: Quality(1.037, 0.063, 0.883),
    3: Quality(1.269, 0.313, 0.738),
    2: Quality(9.99, 2.534, 0.287),
}
MAGNITUDE = {
    24: Quality(3.09, 1.343, 0.470),
    48: Quality(2.18, 0.923, 0.560),
    50: Quality(1.677, 0.623, 0.628),
}
WANDA = {
    24: Quality(2.30, 1.035, 0.539),
    48: Quality(1.736, 0.700, 0.616),
    50: Quality(1.421, 0.443, 0.695),
}
SPARSEGPT = {
    24: Quality(1.639, 0.649, 0.641),
    48: Quality(1.425, 0.474, 0.682),
    50: Quality(1.292, 0.334, 0.732),
}
DEPTH = {
    88: Quality(1.243, 0.305, 0.745),
    75: Quality(1.79, 0.742, 0.606),
    62: Quality(2.94, 1.306, 0.479),
    50: Quality(5.33, 1.916, 0.376),
    25: Quality(23.3, 3.434, 0.200),
}
# Through the engine, which rounds activations too.
W8A8 = {8: Quality(1.001, 0.0025, 0.975)}
SMOOTHQUANT = {8: Quality(1.001, 0.0019, 0.979)}
OUTLIER = {8: Quality(1.0005, 0.0017, 0.979)}
FP8 = {8: Quality(1.001, 0.004, 0.965)}
EMBED = {8: Quality(1.0001, 0.0002, 0.991), 4: Quality(1.013, 0.0148, 0.936)}
WIDTH = {
    90: Quality(1.126, 0.167, 0.802),
    75: Quality(1.528, 0.536, 0.676),
    50: Quality(2.81, 1.221, 0.521),
}
SVD = {
    90: Quality(1.031, 0.067, 0.877),
    80: Quality(1.105, 0.195, 0.794),
    60: Quality(1.54, 0.623, 0.646),
    40: Quality(5.78, 2.053, 0.400),
}
# Measured by the engine's own steps, through the quantized cache.
KIVI = {8: Quality(1.0001, 0.0001, 0.993), 4: Quality(1.005, 0.0078, 0.957)}
