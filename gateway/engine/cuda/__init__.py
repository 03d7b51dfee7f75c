"""The step of a decoder on CUDA: Triton kernels, CUDA graphs by batch size, paged attention."""
