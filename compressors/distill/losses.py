"""Token-level losses of distillation, per position. Pure tensors.

With teacher p and student q over the vocabulary at one position:

- forward KL, T² KL(p‖q) = T² Σ p (log p − log q) with both distributions softened by dividing
  logits by a temperature T: Hinton et al. 2015 (arXiv:1503.02531, section 2; the cross-entropy with
  soft targets up to a constant, and T² so that gradients keep their size);
- reverse KL, KL(q‖p) = Σ q (log q − log p): MiniLLM (arXiv:2306.08543, eq. 1), and GKD's divergence
  at the student's end (arXiv:2306.13649, section 3);
- cross-entropy −log q(y): what is left when only the teacher's words are known (Kim & Rush 2016,
  arXiv:1606.07947, eq. for L_SEQ-KD in section 3.2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher ‖ student) in nats: logits [..., V] of any float dtype → float32 [...]."""
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher) in nats: logits [..., V] of any float dtype → float32 [...]."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def cross_entropy(student: Tensor, words: Tensor) -> Tensor:
    """−log q(word) in nats: logits [..., V] and int64 [...] → float32 [...]."""
    flat = F.cross_entropy(student.float().flatten(0, -2), words.flatten(), reduction="none")
    return flat.view(words.shape)
