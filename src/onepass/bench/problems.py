"""Cases of operations that take tensors and give tensors: how ours and every peer are set up, checked and timed, on the
CPU and on GPUs. An operation's bench.py says what the tensors are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onepass.bench.peers import Inputs, Peer
from onepass.bench.registry import Case, Group, Prepared, Value
from onepass.testing import numerics

CHECKED_ROWS = 32  # of each problem, the first and the last, are compared with fp64
CHECKED_ELEMENTS = 1 << 20  # of each tensor in them, likewise
IGNORED = -100  # a target that does not count, for every peer
OURS = {"cpu": "onepass-cpu", "cuda": "onepass-triton"}
BACKENDS = {"cpu": "cpu", "cuda": "triton"}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward-backward"
# Whether results go to memory that the process has touched before, or to new pages, which the system must clear first.
REUSED_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
PAGES: dict[str, dict[str, str]] = {"reused": REUSED_PAGES | {"MALLOC_TOP_PAD_": str(1 << 28)}, "fresh": {}}
HOST_BARS = {"seconds": 15e-6, "ratio": 1.0}
CPU_BARS = {"ratio": 1.3}


@dataclass(frozen=True)
class Operation:
    """What all problems of one operation share.

    call:      the public function; takes the inputs by name, and backend=.
    peers:     by name; "eager" is compiled, too.
    rows:      of inputs, and of "out" for all outputs: the dimension that runs over rows, which do not depend on each
               other. Inputs without one (weights) serve all rows.
    gradients: the inputs whose gradients are taken.
    target:    the input that holds classes, for an operation that gives the mean loss of its rows.
    """

    name: str
    call: Callable[..., Any]
    peers: Mapping[str, Peer]
    rows: Mapping[str, int]
    gradients: tuple[str, ...]
    target: str = ""


@dataclass(frozen=True)
class Problem:
    """One size of an operation.

    draw:     makes the inputs on a device, floating-point ones in the given dtype unless they are fp32 by definition.
    elements: of the given dtype, that a direction must at least read and write; directions without it count no bytes.
    flops:    of a direction.
    """

    operation: Operation
    name: str
    params: Mapping[str, Value]
    draw: Callable[[str, torch.dtype], Inputs]
    elements: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)

    def case(
        self, direction: str, device: str, dtype: torch.dtype, bars: Mapping[str, float] | None = None, **fields: Any
    ) -> Case:
        kind = str(dtype).removeprefix("torch.")
        short = {"float32": "fp32", "bfloat16": "bf16"}.get(kind, kind)
        return Case(
            name=f"{self.operation.name} {self.name}{f' {short}' if device == 'cpu' else ''}",
            params={**self.params, "operation": self.operation.name, "direction": direction},
            dtype=kind,
            prepare=partial(prepare, self, direction, device, dtype),
            flops=self.flops.get(direction, 0.0),
            min_bytes=self.elements.get(direction, 0.0) * dtype.itemsize,
            bars=dict(bars or {}),
            **fields,
        )

    def host_case(self) -> Case:
        case = self.case(FORWARD, "cuda", torch.bfloat16, HOST_BARS, quick=True)
        return dataclasses.replace(case, min_bytes=0.0, flops=0.0, prepare=partial(prepare_host, self))


# Setting up.


@dataclass(frozen=True)
class Ready:
    """A provider that can be called; `reset` restores what it overwrites."""

    call: Callable[[], Any]
    reset: Callable[[], None] | None


def set_up(operation: Operation, peer: Peer, direction: str, inputs: Inputs, do: Sequence[Tensor] | None) -> Ready:
    """The call of one direction: outputs, or gradients in the order of `operation.gradients`."""
    given = dict(peer.adapt(inputs))
    own = {name: x.clone() if name in peer.overwrites else x for name, x in given.items()}
    own_do = [x.clone() for x in do] if do is not None and "do" in peer.overwrites else do
    if direction != FORWARD:
        own |= {name: own[name].detach().requires_grad_() for name in operation.gradients}
    # Through .data, so that autograd does not mind; the peers' own writes are hidden from it, too.
    restored = [(own[name].data, given[name]) for name in peer.overwrites if name in given]
    if own_do is not None and do is not None and own_do is not do:
        restored += list(zip(own_do, do, strict=True))

    def reset() -> None:
        for mine, kept in restored:
            mine.copy_(kept)

    wanted = [own[name] for name in operation.gradients]
    forward = partial(peer.call, **own)
    call: Callable[[], Any]
    if direction == FORWARD:
        call = forward
    elif direction == BACKWARD:
        call = partial(torch.autograd.grad, forward(), wanted, own_do, retain_graph=True)
    else:
        call = lambda: torch.autograd.grad(forward(), wanted, own_do)  # noqa: E731
    return Ready(call, reset if restored else None)


def contenders(operation: Operation, device: str, direction: str) -> dict[str, Peer]:
    """Ours first, then the peers that may run on the device."""
    found = {OURS[device]: Peer(partial(operation.call, backend=BACKENDS[device]))}
    for name, peer in operation.peers.items():
        if not peer.package or device == "cuda":
            found[name] = peer
        if name == "eager":
            found["torch.compile"] = dataclasses.replace(peer, call=compiled(peer.call, direction))
    return found


def compiled(call: Callable[..., Any], direction: str) -> Callable[..., Any]:
    """torch.compile for this problem alone: static shapes, one graph."""
    from torch._functorch import config

    config.donated_buffer = direction != BACKWARD  # a backward that runs again must not reuse what it was given
    return torch.compile(call, fullgraph=True, dynamic=False)


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def prepare(problem: Problem, direction: str, device: str, dtype: torch.dtype) -> Prepared:
    """Inputs, the calls of all that can run here, and their check."""
    torch._dynamo.reset()
    inputs = problem.draw(device, dtype)
    return _prepared(problem.operation, contenders(problem.operation, device, direction), direction, inputs)


def prepare_host(problem: Problem) -> Prepared:
    """A call as users write it, the backend chosen by the library, and PyTorch's eager twin; the forward on a GPU."""
    operation = problem.operation
    peers = {"onepass": Peer(operation.call), "eager": operation.peers["eager"]}
    return _prepared(operation, peers, FORWARD, problem.draw("cuda", torch.bfloat16))


def _prepared(operation: Operation, peers: Mapping[str, Peer], direction: str, inputs: Inputs) -> Prepared:
    ours = next(iter(peers))
    do = None if operation.target else gradients_of_outputs(operation, peers[ours], inputs)
    ready: dict[str, Ready] = {}
    absent: dict[str, str] = {}
    for name, peer in peers.items():
        if reason := peer.unavailable():
            absent[name] = reason
            continue
        try:
            ready[name] = set_up(operation, peer, direction, inputs, do)
        except Exception as error:
            if name == ours:
                raise
            absent[name] = first_line(error)

    def errors() -> dict[str, float]:
        return check(operation, {name: peers[name] for name in ready}, direction, inputs, do, absent)

    resets = {name: one.reset for name, one in ready.items() if one.reset is not None}
    return Prepared({name: one.call for name, one in ready.items()}, errors, direction != FORWARD, absent, resets)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@torch.no_grad()
def gradients_of_outputs(operation: Operation, ours: Peer, inputs: Inputs) -> list[Tensor]:
    """Random ones, in the shape of the outputs."""
    return [torch.randn_like(out) for out in as_tuple(ours.call(**inputs))]


# Checking: on the first and last rows alone, so that fp64 stays small and quick. Outputs of rows do not depend on other
# rows; for gradients the other rows are made not to count, so that those of weights are sums over the checked rows.


def check(
    operation: Operation,
    peers: Mapping[str, Peer],
    direction: str,
    inputs: Inputs,
    do: Sequence[Tensor] | None,
    absent: dict[str, str],
) -> dict[str, float]:
    """Worst error of each provider in budgets; a peer that fails goes to `absent` instead."""
    rows = checked_rows(operation, inputs)
    if operation.target:
        inputs = {**inputs, operation.target: only_rows_count(inputs[operation.target], rows)}
    elif do is not None:
        do = [zero_outside(x, operation.rows["out"], rows) for x in do]
    part = {
        name: x.index_select(operation.rows[name], rows) if name in operation.rows else x for name, x in inputs.items()
    }
    part_do = None if do is None else [x.index_select(operation.rows["out"], rows) for x in do]
    exact = _reference(operation, direction, part, part_do, double=True)
    rounded = _reference(operation, direction, part, part_do, double=False)
    found: dict[str, float] = {}
    ours = next(iter(peers))
    for name, peer in peers.items():
        try:
            results = as_tuple(set_up(operation, peer, direction, inputs, do).call())
            dims = _row_dims(operation, direction, len(results))
            seen = [_part(x, dim, rows) for x, dim in zip(results, dims, strict=True)]
        except Exception as error:
            if name == ours:
                raise
            absent[name] = first_line(error)
            continue
        found[name] = max(numerics.error_in_budgets(*three) for three in zip(seen, exact, rounded, strict=True))
    return found


def checked_rows(operation: Operation, inputs: Inputs) -> Tensor:
    """Indices of the rows that are compared."""
    name = operation.gradients[0]
    x: Tensor = inputs[name]
    count = x.shape[operation.rows[name]]
    rows = torch.arange(count, device=x.device)
    return rows if count <= CHECKED_ROWS else torch.cat((rows[: CHECKED_ROWS // 2], rows[-CHECKED_ROWS // 2 :]))


def only_rows_count(target: Tensor, rows: Tensor) -> Tensor:
    """Other rows' targets are ignored; those of the checked ones are the first classes, whose gradients are seen."""
    return torch.full_like(target, IGNORED).index_copy_(0, rows, torch.arange(len(rows), device=target.device))


def zero_outside(x: Tensor, dim: int, rows: Tensor) -> Tensor:
    return torch.zeros_like(x).index_copy_(dim, rows, x.index_select(dim, rows))


def _reference(
    operation: Operation, direction: str, inputs: Inputs, do: Sequence[Tensor] | None, double: bool
) -> list[Tensor]:
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    used = {**inputs, **(numerics.in_double(tensors) if double else tensors)}
    used_do = [x.double() for x in do] if double and do is not None else do
    reference = Peer(partial(operation.call, backend="reference"))
    results = as_tuple(set_up(operation, reference, direction, used, used_do).call())
    return [_limited(x) for x in results]


def _row_dims(operation: Operation, direction: str, results: int) -> list[int | None]:
    """Of each result of a call: the dimension that runs over rows."""
    if direction == FORWARD:
        return [operation.rows.get("out")] * results
    return [operation.rows.get(name) for name in operation.gradients]


def _part(x: Tensor, dim: int | None, rows: Tensor) -> Tensor:
    return _limited(x if dim is None else x.index_select(dim, rows))


def _limited(x: Tensor) -> Tensor:
    """At most CHECKED_ELEMENTS of a tensor, the first and the last."""
    flat = x.detach().flatten()
    half = CHECKED_ELEMENTS // 2
    return flat if flat.numel() <= 2 * half else torch.cat((flat[:half], flat[-half:]))


# Groups.


def gpu_group(name: str, title: str, cases: Sequence[Case]) -> Group:
    return Group(name, f"{title}, bf16, cold caches", tuple(cases), unit="us", device="cuda")


def host_group(problems: Sequence[Problem]) -> Group:
    """What a small call costs the host."""
    cases = tuple(problem.host_case() for problem in problems)
    return Group("host", "Host time of a forward call, bf16, no grad", cases, unit="us", device="cuda", clock="host")


def cpu_groups(
    problems: Sequence[Problem],
    directions: Sequence[str] = (FORWARD, BOTH),
    more_bars: Callable[[Case], Mapping[str, float]] = lambda case: {},
) -> tuple[Group, ...]:
    """Every problem in fp32 and bf16, forward and with its backward, on reused and on fresh pages.

    `more_bars` of a case hold where pages are reused.
    """
    groups = []
    for direction in directions:
        for pages, settings in PAGES.items():
            cases = []
            for problem in problems:
                for dtype in (torch.float32, torch.bfloat16):
                    case = problem.case(direction, "cpu", dtype, CPU_BARS, quick=dtype is torch.float32)
                    more = more_bars(case) if pages == "reused" else {}
                    cases.append(dataclasses.replace(case, bars={**case.bars, **more}))
            title = f"CPU, {direction.replace('-', ' + ')}, results on {pages} pages"
            groups.append(Group(f"cpu-{direction}-{pages}", title, tuple(cases), settings=settings, unit="us"))
    return tuple(groups)
