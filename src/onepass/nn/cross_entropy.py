"""Cross-entropy losses as modules."""

from typing import Any

import torch
from torch import Tensor

from onepass.ops.cross_entropy.api import cross_entropy, linear_cross_entropy


class _Loss(torch.nn.Module):
    """The options that both losses share."""

    def __init__(
        self,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        return_lse: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.return_lse = return_lse
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "reduction": self.reduction,
            "return_lse": self.return_lse,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items() if value is not None)


class CrossEntropyLoss(_Loss):
    """`onepass.cross_entropy` with torch.nn.CrossEntropyLoss's constructor and defaults.

    What differs: classes are the LAST dimension of the logits, (..., classes) for a target (...), where torch.nn has
    them second; the loss is fp32 whatever the logits' dtype. Class weights and class probabilities are not supported.

        loss = onepass.nn.CrossEntropyLoss(ignore_index=0)(logits, target)  # (batch, seqlen, classes), (batch, seqlen)

    z_loss, softcap, return_lse: as in `onepass.cross_entropy`. Raises ValueError for `weight`, and for the deprecated
    size_average and reduce.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> None:
        if weight is not None:
            raise ValueError("weight: class weights are not supported; use torch.nn.CrossEntropyLoss")
        if size_average is not None or reduce is not None:
            raise ValueError("size_average and reduce are deprecated in PyTorch: use reduction='mean', 'sum' or 'none'")
        super().__init__(ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, backend)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """loss, or (loss, lse) with return_lse; shapes as in `onepass.cross_entropy`."""
        return cross_entropy(input, target, **self._options())


class LinearCrossEntropyLoss(_Loss):
    """A linear layer and its cross-entropy, `onepass.linear_cross_entropy`, without ever holding all logits.

    weight (num_classes, in_features) and bias (num_classes,) are those of torch.nn.Linear(in_features, num_classes):
    the same initial distribution, the same state_dict. Tie the weight to an embedding by assigning it.

        head = onepass.nn.LinearCrossEntropyLoss(4096, 128256)
        loss = head(x, target)                                                 # (batch, seqlen, 4096), (batch, seqlen)

    The other options are those of the function.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        *,
        low_memory: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        return_lse: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, backend)
        linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.num_classes = num_classes
        self.low_memory = low_memory
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """loss, or (loss, lse) with return_lse; shapes as in `onepass.linear_cross_entropy`."""
        return linear_cross_entropy(
            input, self.weight, target, bias=self.bias, low_memory=self.low_memory, **self._options()
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}, "
            f"low_memory={self.low_memory}, {super().extra_repr()}"
        )
