"""The class loss that pulls a sample towards its target; nothing of gradients.

L = a_bn L_bn + a_cls L_cls + a_adv L_adv, as in DiffDFKD (arXiv 2504.00870): L_bn is kernels/batchnorm_loss.py, L_adv
kernels/kd_loss.py. Every term takes a weight of 0 or 1 per sample. A sample of weight 0 counts nowhere: it is masked,
never multiplied, so that its NaN stays its own.
"""

from torch import Tensor
from torch.nn import functional

from diffdfkd.kernels.kd_loss import counted_mean


def class_loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """L_cls: cross-entropy of logits [B, K] with soft targets [B, K], mean over the samples of weight 1."""
    entropy = -(targets * functional.log_softmax(logits, dim=1)).sum(1)
    return counted_mean(entropy, weight)
