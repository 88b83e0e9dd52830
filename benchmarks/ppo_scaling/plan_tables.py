"""The plan on paper as Markdown tables: `python benchmarks/scaling.py --plan`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.ppo_scaling.plan import (
    BF16,
    FP32,
    LLAMA_8B,
    LLAMA_70B,
    Cluster,
    Job,
    Strategy,
    communication,
    compute_seconds,
    gathered_each_step,
    layer_by_layer,
    peaks,
    split_decoding,
    static,
    whole,
)

STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero2", "fsdp2")
JOBS = (
    Job(LLAMA_8B, "lora"),
    Job(LLAMA_8B, "full"),
    Job(LLAMA_8B, "full", weight_bytes=BF16),
    Job(LLAMA_70B, "lora"),
    Job(LLAMA_70B, "full"),
    Job(LLAMA_70B, "full", weight_bytes=BF16),
)
# The same batch on more GPUs, and a batch that grows with them.
SIZES = ((8, 512), (64, 512), (64, 4096))
PHASES = ("rollout", "scoring", "update")


def plans() -> Iterator[tuple[Job, Cluster]]:
    """What is planned for: jobs on clusters."""
    for job in JOBS:
        for gpus, prompts in SIZES:
            yield replace(job, prompts=prompts), Cluster(gpus)


def memory_table() -> str:
    """GB of a GPU: what lies there, and the peak of each phase; bold: it does not fit."""
    header = ["model", "tuning", "GPUs", "strategy", "weights", "gradients", "buckets", "Adam"]
    header += [f"peak in {phase}" for phase in PHASES]
    rows = []
    for job, cluster in plans():
        if job.prompts != SIZES[0][1]:
            continue
        for strategy in STRATEGIES:
            parts = static(job).of(strategy, cluster.gpus)
            cells = [job.model.name, _tuning(job), str(cluster.gpus), strategy]
            cells += [_gb(parts[name]) for name in ("weights", "gradients", "buckets", "moments")]
            found = peaks(job, cluster, strategy)
            cells += [_gb(found[phase], cluster.memory) for phase in PHASES]
            rows.append(cells)
    return _table(header, rows, left=4)


def time_table() -> str:
    """Seconds of an iteration, and GB that a GPU sends, by phase, where it fits."""
    header = ["model", "tuning", "GPUs", "prompts", "strategy"]
    for phase in PHASES:
        header += [f"{phase}, s", "sent, GB", "sending, s"]
    header += ["together, s"]
    rows = []
    for job, cluster in plans():
        compute = compute_seconds(job, cluster)
        for strategy in STRATEGIES:
            bytes_sent = communication(job, cluster, strategy)
            too_large = _misfits(job, cluster, strategy)
            if set(too_large) - {"rollout"}:
                continue
            mark = ""
            if too_large:  # of fsdp2 with the policy gathered: then each pass gathers it
                if not _fits_unless_gathered(job, cluster, strategy):
                    continue
                bytes_sent["rollout"], mark = gathered_each_step(job, cluster), " (each step)"
            seconds = {phase: bytes_sent[phase] / cluster.link for phase in PHASES}
            cells = [job.model.name, _tuning(job), str(cluster.gpus), str(job.prompts)]
            cells.append(strategy + mark)
            for phase in PHASES:
                cells += [_number(compute[phase]), _gb(bytes_sent[phase]), _number(seconds[phase])]
            cells.append(_number(sum(compute.values()) + sum(seconds.values())))
            rows.append(cells)
    return _table(header, rows, left=5)


def decoding_table() -> str:
    """Ways to decode with sharded weights: seconds of a rollout, and GB that it needs beside."""
    header = ["model", "tuning", "GPUs", "prompts", "gathered each step: s", "gathered once: s"]
    header += ["GB gathered", "split over a node: s", "GB a GPU"]
    rows = []
    for job, cluster in plans():
        decoding = compute_seconds(job, cluster)["rollout"]
        once = communication(job, cluster, "fsdp2")["rollout"] / cluster.link
        cells = [job.model.name, _tuning(job), str(cluster.gpus), str(job.prompts)]
        cells += [_number(decoding + gathered_each_step(job, cluster) / cluster.link)]
        fits = not _misfits(job, cluster, "fsdp2")
        cells += [_number(decoding + once) if fits else "does not fit", _gb(whole(job))]
        cells.append(_number(split_decoding(job, cluster)))
        cells.append(_gb(BF16 * job.model.weights / cluster.gpus_per_node))
        rows.append(cells)
    return _table(header, rows, left=4)


def text() -> str:
    """All tables."""
    parts = ("Memory", memory_table()), ("Time", time_table()), ("Decoding", decoding_table())
    return "\n\n".join(f"{name}\n\n{table}" for name, table in parts)


def _tuning(job: Job) -> str:
    types = {FP32: "float32", BF16: "bfloat16"}
    return "LoRA" if job.tuning == "lora" else f"full, {types[job.weight_bytes]}"


# --- cells ----------------------------------------------------------------------------------------


def _misfits(job: Job, cluster: Cluster, strategy: Strategy) -> list[str]:
    found = peaks(job, cluster, strategy)
    return [phase for phase in PHASES if found[phase] > cluster.memory]


def _fits_unless_gathered(job: Job, cluster: Cluster, strategy: Strategy) -> bool:
    """Whether a rollout fits that gathers a layer at a time."""
    rollout = peaks(job, cluster, strategy)["rollout"] - whole(job) + layer_by_layer(job)
    return strategy == "fsdp2" and rollout <= cluster.memory


def _gb(size: float, limit: float | None = None) -> str:
    number = _number(size / 1e9)
    return f"**{number}**" if limit is not None and size > limit else number


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.05 else "0"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * left + "---:|" * (len(header) - left))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
