"""append_kv's operation in torch.library: it writes into its arguments and returns nothing."""

from typing import Any

from onepass.core.operation import Operation
from onepass.ops.append_kv import kernels, spec


def _fake(*call: Any) -> None:
    return None


append = Operation(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? page_table, "
    "Tensor? k_descale, Tensor? v_descale, Tensor(c!)? k_scale_shift, Tensor(d!)? v_scale_shift, str backend) -> ()",
    table=kernels.APPEND,
    facts=spec.append_facts,
    fake=_fake,
    public="append_kv",
    refusal="onepass.append_kv writes in place and passes no gradient on: call it inside torch.no_grad(), or with "
    "k.detach() and v.detach()",
    vmap_advice="make the mapped dimension part of batch, x.movedim(dim, 0).flatten(0, 1)",
)
