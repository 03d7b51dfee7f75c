"""The standard benchmark's levels: at least one of every family of the survey. Torch-free."""

from __future__ import annotations

STANDARD = (
    "fp32",
    "bf16",
    "int8",
    "int4-rtn-g64",
    "int4-hqq-g64",
    "int4-gptq-g128",
    "int3-gptq-g128",
    "w8a8",
    "w8a8-smoothquant",
    "fp8",
    "int4-gptq-g128+embed8",
    "sparse24-magnitude",
    "sparse24-wanda",
    "sparse24-sparsegpt",
    "sparse50-sparsegpt",
    "width-75",
    "depth-75",
    "lowrank-80",
    "depth-75+int8",
    "depth-75+int4-gptq-g128",
    "width-75+int4-gptq-g128",
    "sparse24-wanda+int8",
    "sparse24-sparsegpt+int4-gptq-g64",
    "lowrank-80+int8",
    "int8+kv8",
    "int4-gptq-g128+kv4",
)
