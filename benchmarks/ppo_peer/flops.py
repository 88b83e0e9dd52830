"""Model FLOPs of an iteration: what the mathematics needs, whoever computes it.

2 FLOPs a weight and token forward, 4 backward (2 where a weight is frozen: its input's gradient
alone), embeddings that are looked up not counted; attention adds 4 x layers x width for each pair
of a token and one that it sees, forward, and twice that backward. Recomputation, padding and logits
that nobody reads are not needed, and so count for nobody.
"""

from dataclasses import dataclass

from benchmarks.ppo_peer.workloads import Shape, Workload


@dataclass(frozen=True)
class Cost:
    """Forward FLOPs of one model."""

    trunk: float  # a token
    head: float  # a token that is given logits
    pair: float  # two tokens of which one sees the other

    def weights(self, prompt: int, response: int, *, logits: bool) -> float:
        """Products with weights for one row, with logits on its response or none."""
        return self.trunk * (prompt + response) + (self.head * response if logits else 0.0)

    def attention(self, prompt: int, response: int) -> float:
        """Products of tokens with tokens for one row."""
        tokens = prompt + response
        return self.pair * tokens * (tokens + 1) / 2


def cost(shape: Shape) -> Cost:
    """Of a shape: weights of its matrices, from transformers' own model on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.model_type, vocab_size=shape.vocabulary, bos_token_id=None, **shape.fields
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    matrices = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    )
    width = config.hidden_size
    return Cost(2.0 * matrices, 2.0 * output.weight.numel(), 4.0 * config.num_hidden_layers * width)


def iteration_flops(workload: Workload, value: str, response_tokens: float) -> dict[str, float]:
    """FLOPs that the rollout and the update of one iteration need."""
    policy = cost(workload.shape)
    critic = cost(workload.critic) if workload.critic else policy
    passes = [(policy, True)] + ([(critic, False)] if value == "separate" else [])
    trained = 3.0 if workload.tuning == "full" else 2.0  # forward passes that training one is worth
    response = round(response_tokens)
    rollout = update = 0.0
    for prompt in workload.prompt_lengths():
        rollout += policy.weights(prompt, response, logits=True)
        rollout += policy.attention(prompt, response)
        for model, logits in passes:
            update += trained * model.weights(prompt, response, logits=logits)
            update += 3.0 * model.attention(prompt, response)
    return {"rollout": rollout, "update": update * workload.ppo_epochs}
