"""What a collective sends. Imports nothing."""


def sent(collective: str, payload: float, processes: int) -> float:
    """Bytes that each of the processes sends in a ring, which is the least there can be.

    Payload is what is reduced or broadcast, the whole that an all-gather makes, the whole that a
    reduce-scatter takes. An all-reduce is a reduce-scatter and an all-gather, in each of which all
    but one of the processes' shares pass by. gloo's reduce-scatter is an all-reduce and sends twice
    this.
    """
    share = (processes - 1) / processes
    return (2 if collective in ("all_reduce", "sums") else 1) * share * payload
