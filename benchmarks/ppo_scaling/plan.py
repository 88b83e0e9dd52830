"""What PPO on many GPUs takes, by arithmetic: nothing here is measured. Imports nothing heavy.

Bytes are decimal (1 GB = 1e9). A strategy is one of

- `ddp`: all weights, gradients and Adam moments in every process;
- `zero2`: gradients and Adam moments are divided over the processes, weights are not;
- `fsdp2`: all three are divided (ZeRO-3, arXiv:1910.02054); a layer's weights are gathered for its
  pass, and the policy's all at once for a rollout where they fit.

As our code keeps them: with LoRA the base is frozen, in memory once for all four roles, in
bfloat16, and adapters are float32. With full fine-tuning policy, value, reference and reward are
four models in `model.dtype`; gradients and both Adam moments have the weights' type; the value
model has no output layer.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from benchmarks.ppo_scaling.ring import sent

Strategy = Literal["ddp", "zero2", "fsdp2"]
FP32, BF16 = 4, 2  # bytes
LOGITS = 1 << 24  # made at a time (`pipeline.models.trunk.LOGITS_AT_A_TIME`)
COPIES_OF_LOGITS = 2  # measured: "How PPO's cost grows" in RESULTS.md
GATHERED_UNITS = 2  # layers in memory at a time: one computes, the next is being gathered
BUCKET = 0.5e9  # bytes: gradients on their way, of strategies that divide them


@dataclass(frozen=True)
class Model:
    """A Llama: grouped attention, three matrices in the MLP, untied embeddings."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        """Of keys, and of values."""
        return self.width // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        """Weights of a layer: q and output, k and v, MLP; two norms."""
        d = self.width
        return 2 * d * d + 2 * d * self.kv_width + 3 * d * self.inner + 2 * d

    @property
    def output(self) -> int:
        """Weights of the output layer, and of the embeddings."""
        return self.vocabulary * self.width

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.width + 2 * self.output

    def adapter(self, rank: int) -> int:
        """Weights of LoRA on all linear layers: rank x (inputs + outputs) of each."""
        d, kv = self.width, self.kv_width
        return self.layers * rank * (4 * d + 2 * (d + kv) + 3 * (d + self.inner))


LLAMA_8B = Model("8B", 32, 4096, 14336, 32, 8, 128_256)
LLAMA_70B = Model("70B", 80, 8192, 28672, 64, 8, 128_256)


@dataclass(frozen=True)
class Cluster:
    """H100s: vendor's peaks, and what share of them is assumed to be reached."""

    gpus: int
    gpus_per_node: int = 8
    memory: float = 80e9  # bytes of a GPU
    flops: float = 989e12  # a second, bfloat16, dense
    reads: float = 3.35e12  # bytes a second from its memory
    nvlink: float = 450e9  # bytes a second, one way, a GPU
    network: float = 50e9  # bytes a second a GPU: 400 Gbit/s
    reached_flops: float = 0.4  # MFU
    reached_reads: float = 0.6
    reached_links: float = 0.8
    spared: float = 6e9  # bytes: CUDA context, NCCL's buffers, fragments

    @property
    def link(self) -> float:
        """Bytes a second that a process sends in a ring.

        Between nodes there are as many rings as network cards, each with a share of the data, so
        that together the cards of a node carry what each of its GPUs sends.
        """
        wires = self.nvlink
        if self.gpus > self.gpus_per_node:
            wires = min(wires, self.gpus_per_node * self.network)
        return wires * self.reached_links


@dataclass(frozen=True)
class Job:
    """A model, what is trained of it, and one iteration."""

    model: Model
    tuning: Literal["lora", "full"]
    weight_bytes: int = FP32  # of full fine-tuning; float32 with run.mixed_precision: bf16
    rank: int = 32
    prompts: int = 512
    prompt_tokens: int = 512
    response_tokens: int = 512
    epochs: int = 1
    minibatches: int = 8
    micro_batch_tokens: int = 16384
    generation_rows: int = 64  # of a process at a time

    @property
    def tokens(self) -> int:
        """Of a row."""
        return self.prompt_tokens + self.response_tokens

    @property
    def base_bytes(self) -> int:
        """Bytes of a weight of the base."""
        return BF16 if self.tuning == "lora" else self.weight_bytes

    def rows(self, cluster: Cluster) -> int:
        """Responses of a process."""
        return ceil(self.prompts / cluster.gpus)

    def passes(self, cluster: Cluster) -> tuple[int, int]:
        """Micro-batches of a process: without gradient in an iteration, with it in a step."""
        rows = self.rows(cluster)
        fitting = max(self.micro_batch_tokens // self.tokens, 1)
        return ceil(rows / fitting), ceil(ceil(rows / self.minibatches) / fitting)

    def groups(self, cluster: Cluster) -> int:
        """How often a process decodes `generation_rows` to their end."""
        return ceil(self.rows(cluster) / self.generation_rows)


# --- memory: bytes of a GPU -----------------------------------------------------------------------


@dataclass(frozen=True)
class Static:
    """Bytes of all processes together, if each thing were in memory once."""

    frozen: float
    trained: float  # weights; gradients take as much
    moments: float

    def of(self, strategy: Strategy, gpus: int) -> dict[str, float]:
        """Bytes in each process."""
        weights = self.frozen + self.trained
        gradients, moments = self.trained, self.moments
        if strategy == "fsdp2":
            weights /= gpus
        if strategy in ("fsdp2", "zero2"):
            gradients, moments = gradients / gpus, moments / gpus
        # DDP's buckets are copies of all gradients, and stay (measured: RESULTS.md).
        buckets = self.trained if strategy == "ddp" else BUCKET
        return {
            "weights": weights,
            "gradients": gradients,
            "buckets": buckets,
            "moments": moments,
        }


def static(job: Job) -> Static:
    """Weights and optimiser state of all roles.

    LoRA: the base once; adapters of policy and value are trained, those of reference and reward
    are not. Full: policy and value (without output layer) are trained, reference and reward not.
    """
    model = job.model
    if job.tuning == "lora":
        adapter = FP32 * model.adapter(job.rank)
        return Static(BF16 * model.weights + 2 * adapter, 2 * adapter, 4 * adapter)
    trained = job.weight_bytes * (2 * model.weights - model.output)
    return Static(2 * job.weight_bytes * model.weights, trained, 2 * trained)


def working(job: Job, cluster: Cluster, strategy: Strategy) -> dict[str, float]:
    """Bytes of a process by phase besides weights, gradients and moments.

    - rollout: keys and values (2 x layers x kv width, bfloat16) of each token of the rows that are
      written at a time; with `fsdp2` the policy's gathered weights;
    - scoring: a layer's numbers, 10 x width + 4 x inner a token (`points.working_bytes`), logits;
    - update, layers recomputed: the input of every layer, numbers of one, logits; both models pass
      before the backward pass begins, since many processes take one pass for both;
    - with `fsdp2` in both: two gathered layers, and embeddings and output layer;
    - float32 weights under autocast: bfloat16 copies of the trained models' weights, which autocast
      keeps until it is left; with `fsdp2`, which casts layers before it gathers them, of the output
      layer alone.
    """
    model = job.model
    rows = min(job.rows(cluster), job.generation_rows)
    rollout = rows * job.tokens * 2.0 * model.layers * model.kv_width * BF16
    tokens = min(job.micro_batch_tokens // job.tokens, job.rows(cluster)) * job.tokens
    step_rows = ceil(job.rows(cluster) / job.minibatches)
    step_tokens = min(job.micro_batch_tokens // job.tokens, step_rows) * job.tokens
    layer = BF16 * (10 * model.width + 4 * model.inner)
    stream = BF16 if job.base_bytes == BF16 else FP32  # type of the states between layers
    scoring = update = FP32 * float(COPIES_OF_LOGITS * LOGITS)
    scoring += tokens * layer
    update += step_tokens * (layer + 2 * model.layers * model.width * stream)
    if strategy == "fsdp2":
        rollout += whole(job)
        scoring += layer_by_layer(job)
        update += layer_by_layer(job)
    if job.tuning == "full" and job.weight_bytes == FP32:
        copies = BF16 * (model.output if strategy == "fsdp2" else model.weights)
        rollout, scoring, update = rollout + copies, scoring + 2 * copies, update + 2 * copies
    return {"rollout": rollout, "scoring": scoring, "update": update}


def whole(job: Job) -> float:
    """Bytes of a trunk with all its layers gathered: the adapters of all four roles lie in them.

    Passes are in bfloat16, and layers are cast before they are gathered.
    """
    model = job.model
    layers = model.layers * model.layer
    adapters = 4 * model.adapter(job.rank) if job.tuning == "lora" else 0
    return BF16 * (layers + adapters) + job.base_bytes * (model.weights - layers)


def layer_by_layer(job: Job) -> float:
    """Bytes gathered at a time otherwise: two layers, embeddings and output layer."""
    return BF16 * GATHERED_UNITS * job.model.layer + job.base_bytes * 2 * job.model.output


def peaks(job: Job, cluster: Cluster, strategy: Strategy) -> dict[str, float]:
    """Bytes of a GPU by phase. Gradients are there in updates alone."""
    parts = static(job).of(strategy, cluster.gpus)
    resting = parts["weights"] + parts["moments"] + parts["buckets"] + cluster.spared
    found = {name: resting + size for name, size in working(job, cluster, strategy).items()}
    found["update"] += parts["gradients"]
    return found


# --- communication: bytes that a process sends in an iteration ------------------------------------


def communication(job: Job, cluster: Cluster, strategy: Strategy) -> dict[str, float]:
    """Bytes by phase, of weights and gradients; the rest is below a megabyte.

    - `ddp`: an all-reduce of the gradients a step.
    - `zero2`: a reduce-scatter of the gradients a micro-batch, an all-gather of the trained weights
      a step.
    - `fsdp2`: rollouts gather the policy once; scoring gathers the model of each of its four roles
      (in half precision the policy's log-probs are computed again) a micro-batch; updates gather
      both models twice a micro-batch, forward and backward, and reduce-scatter gradients each time.
      (Embeddings and output layer may stay for the backward pass: this is the most.)
    """
    gpus, steps = cluster.gpus, job.epochs * job.minibatches
    without, with_gradient = job.passes(cluster)
    trained = static(job).trained
    found = {"rollout": 0.0, "scoring": 0.0, "update": 0.0}
    if strategy == "ddp":
        found["update"] = steps * sent("all_reduce", trained, gpus)
    elif strategy == "zero2":
        reduced = with_gradient * sent("reduce_scatter", trained, gpus)
        found["update"] = steps * (reduced + sent("all_gather", trained, gpus))
    else:
        gather = sent("all_gather", whole(job), gpus)
        found["rollout"] = gather
        found["scoring"] = 4 * without * gather
        reduced = sent("reduce_scatter", trained, gpus)
        found["update"] = steps * with_gradient * (4 * gather + reduced)
    return found


def gathered_each_step(job: Job, cluster: Cluster) -> float:
    """Bytes that a process sends in a rollout with `fsdp2` if every pass gathers the policy.

    A prefill and a pass a response token, for each group of rows.
    """
    passes = job.groups(cluster) * (1 + job.response_tokens)
    return passes * sent("all_gather", whole(job), cluster.gpus)


def split_decoding(job: Job, cluster: Cluster) -> float:
    """Seconds of a rollout whose weights lie split over a node (tensor parallel, as vLLM does it).

    The GPUs of a node write their rows together, all at once: each reads its share of the weights
    (as bfloat16) at every step, and its share of keys and values; the states of each row's token
    are all-reduced twice a layer. Delays of these small reductions are not counted.
    """
    model, gpus = job.model, cluster.gpus_per_node
    rows = job.rows(cluster) * gpus
    states = 2 * model.layers * sent("all_reduce", rows * model.width * BF16, gpus)
    words = states / (cluster.nvlink * cluster.reached_links)
    reads = BF16 * model.weights / gpus + cached(job, cluster)
    step = reads / (cluster.reads * cluster.reached_reads) + words
    return prefill_seconds(job, cluster) + job.response_tokens * step


# --- seconds --------------------------------------------------------------------------------------


def forward_flops(model: Model, prompt: int, response: int) -> float:
    """Of a row: 2 a weight and token, logits of the response alone, and attention.

    Attention is 4 x layers x width for each pair of a token and one that it sees.
    """
    tokens = prompt + response
    pairs = tokens * (tokens + 1) / 2
    body = 2.0 * model.layers * model.layer * tokens
    return body + 2.0 * model.output * response + 4.0 * model.layers * model.width * pairs


def compute_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Seconds of an iteration by phase, without communication; the same for every strategy.

    Decoding reads the policy's weights (as bfloat16) and the rows' keys and values at every step;
    the prefill is a forward pass. Scoring is four forward passes (four roles). Updates
    train two models: forward, backward (twice that, or once through frozen weights), and layers
    computed again. Adapters' own products are left out (1% to 2%).
    """
    model, rows = job.model, job.rows(cluster)
    peak = cluster.flops * cluster.reached_flops
    forward = forward_flops(model, job.prompt_tokens, job.response_tokens)
    reads = job.groups(cluster) * BF16 * model.weights + cached(job, cluster)
    decoding = job.response_tokens * reads / (cluster.reads * cluster.reached_reads)
    worth = 3 if job.tuning == "lora" else 4
    return {
        "rollout": prefill_seconds(job, cluster) + decoding,
        "scoring": 4 * rows * forward / peak,
        "update": job.epochs * 2 * worth * rows * forward / peak,
    }


def prefill_seconds(job: Job, cluster: Cluster) -> float:
    """Seconds of a forward pass over the prompts of a process, with logits at their ends."""
    flops = job.rows(cluster) * forward_flops(job.model, job.prompt_tokens - 1, 1)
    return flops / (cluster.flops * cluster.reached_flops)


def cached(job: Job, cluster: Cluster) -> float:
    """Bytes of keys and values that a process reads at a step of decoding, on average."""
    seen = job.prompt_tokens + (job.response_tokens + 1) / 2
    return job.rows(cluster) * seen * 2 * job.model.layers * job.model.kv_width * BF16
