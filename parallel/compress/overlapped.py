"""PowerSGD a bucket at a time, while the gradients of other buckets are still being computed.

A bucket's factors are reduced without waiting, and kept aside: error buffers and Q change only in
`settle`, when it is known that every gradient was finite. Otherwise the whole update is reduced
again in one piece, so that a refused update leaves the same error buffers as PowerSGD does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.compress.orthogonal import orthonormal
from parallel.compress.powersgd import PowerSGD, Stack, _turn


@dataclass
class _Flight:
    """One bucket's stacks on their way: first all P, then all Q, in an all-reduce each."""

    stacks: list[Stack]
    owed: list[Tensor]
    """(n, short, long) gradients with the errors of earlier updates; dropped when P is known."""
    flat: Tensor
    """The factors that are being reduced, joined."""
    work: "dist.Work | None"
    sent: int = 0
    """Elements of the factors."""
    finite: list[Tensor] = field(default_factory=list)
    """0-dim flags of the reduced factors."""


class OverlappedPowerSGD(PowerSGD):
    """Error buffers, and an all-reduce of each bucket that others overlap."""

    _flights: list[_Flight]

    @torch.no_grad()
    def start(self, bucket: str, gradients: Mapping[str, Tensor]) -> None:
        """Send P of a bucket's gradients, and Q of the bucket that was started before.

        All ranks must start the same buckets in the same order. Gradients must stay unchanged
        until `settle`. Shapes: (rows, columns).
        """
        stacks = [stack for stack in self._batches if stack.bucket == bucket]
        if not hasattr(self, "_flights"):
            self._flights = []
        owed = []
        for stack in stacks:
            whole = torch.stack([_turn(gradients[m.name], m) for m in stack.members])
            owed.append(whole.add_(stack.error) if self._feedback else whole)
            stack.p = owed[-1] @ stack.q
        if stacks:
            flat, work = self._send([stack.p for stack in stacks])
            self._flights.append(_Flight(stacks=stacks, owed=owed, flat=flat, work=work))
            self._advance(self._flights[:-1])

    @torch.no_grad()
    def finish(self) -> tuple[dict[str, Tensor], Tensor, int]:
        """Wait for all factors.

        Returns the sum of squares of each mean gradient by name, infinite if any gradient was not
        finite; a 0-dim flag that is False then, the same on all ranks of the group; and the bytes
        that were sent.
        """
        flights = getattr(self, "_flights", [])
        self._advance(flights)
        squares: dict[str, Tensor] = {}
        flags, sent = [torch.ones((), dtype=torch.bool, device=self._device)], 0
        for flight in flights:
            self._arrive(flight, [stack.q_mean for stack in flight.stacks])
            flags += flight.finite
            sent += flight.sent
            for stack in flight.stacks:
                sums = stack.q_mean.square().sum((1, 2))
                squares |= {m.name: sums[i] for i, m in enumerate(stack.members)}
        fine = torch.stack(flags).all()
        broken = torch.tensor(math.inf, device=self._device)
        squares = {name: torch.where(fine, square, broken) for name, square in squares.items()}
        return squares, fine, self._payload.itemsize * sent

    @torch.no_grad()
    def settle(self, gradients: Mapping[str, Tensor], everywhere: bool, here: bool) -> None:
        """Replace gradients by their means, and keep what they lack as errors.

        `everywhere`: False if a gradient of any rank of the group was not finite; `here`: of this
        one. Shapes: (rows, columns), as they were given to `start`.
        """
        if not everywhere:
            means = self.reduce(gradients, here).gradients
            for name, gradient in gradients.items():
                gradient.copy_(means[name])
        else:
            for stack in self._batches:
                self._commit(stack, gradients)
        self._flights = []

    def _commit(self, stack: Stack, gradients: Mapping[str, Tensor]) -> None:
        mean = stack.p @ stack.q_mean.transpose(1, 2)
        for i, member in enumerate(stack.members):
            gradient = gradients[member.name]
            if self._feedback:
                stack.error[i] += _turn(gradient, member)
            else:
                stack.error[i] = _turn(gradient, member)
            gradient.copy_(_turn(mean[i], member))
        if self._feedback:
            stack.error -= mean
        if self._warm:
            stack.q = stack.q_mean.clone()

    def _advance(self, flights: list[_Flight]) -> None:
        """Go from P to Q where that has not been done; always in the order of the buckets.

        When a step sends what must not depend on how fast this rank is: a bucket waits for the
        next one's P, whether its own has arrived or not.
        """
        for flight in (each for each in flights if each.owed):
            self._arrive(flight, [stack.p for stack in flight.stacks])
            bases = orthonormal([stack.p for stack in flight.stacks])
            for stack, basis, owed in zip(flight.stacks, bases, flight.owed, strict=True):
                stack.p = basis
                stack.q_mean = owed.transpose(1, 2) @ stack.p
            flight.owed = []
            flight.flat, flight.work = self._send([stack.q_mean for stack in flight.stacks])

    def _send(self, factors: list[Tensor]) -> "tuple[Tensor, dist.Work | None]":
        flat = torch.cat([factor.reshape(-1) for factor in factors])
        if self._group is None:
            return flat, None
        if self._payload != flat.dtype:
            flat = (flat / self._size).to(self._payload)
        return flat, dist.all_reduce(flat, group=self._group, async_op=True)

    def _arrive(self, flight: _Flight, factors: list[Tensor]) -> None:
        """Wait for the reduction of a flight, and copy the means to its factors."""
        if flight.work is not None:
            flight.work.wait()
        flat = flight.flat.float()
        if flight.flat.dtype == flat.dtype:
            flat /= self._size
        flight.finite.append(torch.isfinite(flat).all())
        flight.sent += flat.numel()
        parts = torch.nan_to_num(flat).split([factor.numel() for factor in factors])
        for factor, part in zip(factors, parts, strict=True):
            factor.copy_(part.view_as(factor))
