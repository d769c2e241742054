"""The choice of the generator: time eager and compiled, time to compile, and birthday collisions, each in one run.

Published generators (Threefry-2x32 and Philox-2x32, Salmon et al. 2011; Squares, Widynski 2020) against 32-bit mixers
used as a plain bijection and with the counter fed forward. Each makes a dropout mask for 256 x 512 floats.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from graphreg.rng.hash import mix, shift, signed

K0, K1 = torch.tensor(123456789, dtype=torch.int32), torch.tensor(-987654321, dtype=torch.int32)
K64, LOW = torch.tensor(0x1234567DEADBEEF), 0xFFFFFFFF
Z = torch.randn(256, 512)


def threefry(counter: Tensor, rounds: int = 20) -> Tensor:
    keys = [K0, K1, K0 ^ K1 ^ signed(0x1BD11BDA)]
    x0, x1 = counter + keys[0], torch.zeros_like(counter) + keys[1]
    for n in range(rounds):
        by = (13, 15, 26, 6, 17, 29, 16, 24)[n % 8]
        x0 = x0 + x1
        x1 = ((x1 << by) | shift(x1, 32 - by)) ^ x0
        if n % 4 == 3:
            at = n // 4 + 1
            x0, x1 = x0 + keys[at % 3], x1 + keys[(at + 1) % 3] + at
    return x0


def philox(counter: Tensor, rounds: int = 10) -> Tensor:
    left, right, key = counter.long() & LOW, torch.zeros_like(counter, dtype=torch.int64), K0.long() & LOW
    for _ in range(rounds):
        product = left * 0xD256D193
        left, right, key = ((product >> 32) & LOW) ^ key ^ right, product & LOW, (key + 0x9E3779B9) & LOW
    return left.int()


def squares(counter: Tensor) -> Tensor:
    x = y = counter.long() * K64
    for add in (y, y + K64, y):
        x = x * x + add
        x = ((x >> 32) & LOW) | (x << 32)
    return ((x * x + y + K64) >> 32).int()


def bijection(counter: Tensor) -> Tensor:
    return mix(counter, K0, K1) - (counter ^ K1)


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "triple32, fed forward (graphreg)": lambda counter: mix(counter, K0, K1),
    "triple32, a bijection": bijection,
    "Squares": squares,
    "Philox-2x32-10": philox,
    "Threefry-2x32-20": threefry,
}


def dropout(generator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(z: Tensor) -> Tensor:
        bits = generator(torch.arange(z.numel(), dtype=torch.int32).view(z.shape))
        return z * (1 + ((shift(bits, 1) - 214748364) >> 31)).to(z.dtype)

    return run


def birthdays(generator: Callable[[Tensor], Tensor], draws: int = 1 << 24) -> float:
    repeated = draws - torch.unique(generator(torch.arange(draws, dtype=torch.int32))).numel()
    expected = draws - 2.0**32 * -math.expm1(draws * math.log1p(-(2.0**-32)))
    return (repeated - expected) / math.sqrt(expected)


def main(rounds: int = 60) -> None:
    torch.set_num_threads(1)
    eager: dict[str, Callable[[Tensor], Tensor]] = {name: dropout(g) for name, g in GENERATORS.items()}
    eager["F.dropout"] = lambda z: torch.nn.functional.dropout(z, 0.1)
    compiled, compiling = {}, {}
    for name, run in eager.items():
        start = time.perf_counter()
        compiled[name] = torch.compile(run, fullgraph=True)
        compiled[name](Z)
        compiling[name] = time.perf_counter() - start
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):  # interleaved: a slow moment of the machine is everybody's
        for kind, runs in (("eager", eager), ("compiled", compiled)):
            for name, run in runs.items():
                start = time.perf_counter()
                run(Z)
                times.setdefault((kind, name), []).append((time.perf_counter() - start) * 1e6)
    print(f"torch {torch.__version__}, one thread; microseconds for {Z.numel()} elements, median of {rounds}")
    print(f"{'generator':34} {'eager':>8} {'compiled':>9} {'compile, s':>11} {'birthday z':>11}")
    for name in eager:
        z = f"{birthdays(GENERATORS[name]):11.1f}" if name in GENERATORS else " " * 11
        row = [statistics.median(times[kind, name]) for kind in ("eager", "compiled")]
        print(f"{name:34} {row[0]:8.0f} {row[1]:9.0f} {compiling[name]:11.1f} {z}")


if __name__ == "__main__":
    main()
