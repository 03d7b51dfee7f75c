"""2:4 sparse weights: the layout and kernel of `sparse`, with a pattern known beforehand.

The mask keeps exactly two in every four columns; K is padded to 32 and padding keeps its first two
columns with value 0, so that any run of 32 columns owns exactly 16 values. Values are [N, Kp/2]
when dense, or a nested form of [N, K/2].
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from compressors.tensor import Dense, LinearForm, Sparse24, StoredLinear
from gateway.engine.kernels.scheme import PackChild, Scheme, UnpackChild, nest, nested
from gateway.engine.kernels.sparse import BitmapLinear, pack_mask, unpack_mask


def pack(form: Sparse24, child: PackChild) -> StoredLinear:
    n, k = form.shape
    if k % 4 or form.values.shape != (n, k // 2):
        raise ValueError(f"2:4 sparse weight of shape {form.shape}, values {form.values.shape}")
    padded = -(-k // 32) * 32
    keep = torch.zeros(n, padded // 4, 4, dtype=torch.bool, device=form.index.device)
    keep[:, k // 4 :, :2] = True
    keep[:, : k // 4].scatter_(2, form.index.view(n, k // 4, 2).long(), True)
    if int(keep.sum()) != n * padded // 2:
        raise ValueError("2:4 index keeps a column twice")
    mask = pack_mask(keep.view(n, padded))
    stored = StoredLinear("sparse24", "bitmap", {"n": n, "k": k}, {"mask": mask})
    return nest(stored, values=child(_pad_values(form.values, padded // 2)))


def _pad_values(values: LinearForm, width: int) -> LinearForm:
    if isinstance(values, Dense):
        return Dense(F.pad(values.weight, (0, width - values.shape[1])))
    return values


def unpack(stored: StoredLinear, child: UnpackChild) -> Sparse24:
    n, k = int(stored.meta["n"]), int(stored.meta["k"])
    values = child(nested(stored, "values"))
    if isinstance(values, Dense):
        values = replace(values, weight=values.weight[:, : k // 2])
    keep = unpack_mask(stored.tensors["mask"])[:, :k].view(n, k // 4, 4)
    index = torch.argsort(keep.to(torch.uint8), dim=2, descending=True, stable=True)[:, :, :2]
    return Sparse24(values=values, index=index.reshape(n, k // 2).to(torch.uint8))


class Sparse24Linear(BitmapLinear):
    """Computes from values and mask."""

    def _pattern(self, stored: StoredLinear) -> tuple[int, bool]:
        return self.in_features // 2, True


SCHEME = Scheme(pack, unpack, Sparse24Linear)
