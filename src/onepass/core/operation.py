"""An operation of torch.library in one object: schema, body, fake, gradient, and the short way of a plain call.

Every operation's last argument is `str backend`, "" to leave the choice to the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from onepass.core import torch_compat
from onepass.core.registry import KernelTable, select
from onepass.core.replay import PlainCalls

Call = tuple[Any, ...]

LIBRARY = torch.library.Library("onepass", "FRAGMENT")


class Operation:
    """`torch.ops.onepass.<name>`.

    schema: of torch.library, with `str backend` as the last argument; outputs never alias inputs. An operation that
            writes into arguments (Tensor(a!)) has no outputs, and refuses arguments that require a gradient.
    table:  the kernels that do it; a launcher takes the arguments but for the backend.
    facts:  checks those arguments and gives the fields of the table's spec.
    fake:   outputs of the right shape, dtype and device, for the same arguments.
    save, differentiate: as torch.library.register_autograd has them; without them differentiating raises `refusal`.
    public: the public function, for messages; `vmap_advice`: what to do in the place of a torch.vmap.
    """

    def __init__(
        self,
        schema: str,
        *,
        table: KernelTable,
        facts: Callable[..., Call],
        fake: Callable[..., Any],
        public: str,
        save: Callable[[Any, Call, Any], None] | None = None,
        differentiate: Callable[..., tuple[Any, ...]] | None = None,
        refusal: str = "",
        vmap_advice: str = "make the mapped dimension a leading dimension of x",
    ) -> None:
        self.table, self.facts = table, facts

        def checked_fake(*args: Any) -> Any:
            facts(*args[:-1])
            return fake(*args[:-1])

        self._plain = PlainCalls(table, self.body, self._dispatched)
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        self.op = getattr(torch.ops.onepass, name).default
        LIBRARY.impl(name, self.body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"onepass::{name}", checked_fake, lib=LIBRARY)
        torch.library.register_vmap(f"onepass::{name}", _refuses_vmap(public, vmap_advice), lib=LIBRARY)
        self._writes = self.op._schema.is_mutable
        if self._writes:
            torch_compat.register_mutation(LIBRARY, self.op, refusal)
            return
        if differentiate is None:
            refusal = refusal or f"onepass.{public} has no second derivative (create_graph=True)"
            save, differentiate = _save_nothing, _refuses_gradient(refusal)
        assert save is not None
        self._recorded = torch_compat.register_autograd(LIBRARY, self.op, self._plain, save, differentiate)

    def body(self, *args: Any) -> Any:
        """Checks, chooses, launches."""
        call = args[:-1]
        return select(self.table, self.facts(*call), args[-1])(*call)

    def _dispatched(self, *args: Any) -> Any:
        return self.op(*args)

    def __call__(self, *args: Any) -> Any:
        """Through the dispatcher, where it has anything to add but autograd."""
        if torch.compiler.is_compiling():
            return self.op(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if self._writes:  # never replayed: PyTorch counts the writes
            return self.op(*args)
        if any(map(torch_compat.batched_gradient, tensors)):
            return self.op(*args)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return self._plain(*args)
        return (self._recorded if torch_compat.only_autograd(*tensors) else self.op)(*args)


def _save_nothing(ctx: Any, inputs: Call, outputs: Any) -> None:
    pass


def _refuses_gradient(message: str) -> Any:
    def differentiate(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(message)

    return differentiate


def _refuses_vmap(public: str, advice: str) -> Any:
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"torch.vmap over onepass.{public} is not supported: {advice}")

    return vmap
