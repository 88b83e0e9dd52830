"""Policy and value model as one module: what is trained, and what many processes wrap."""

from collections.abc import Collection

from torch import nn

from pipeline.batches import TokenBatch
from pipeline.models.calls import TrunkOutput
from pipeline.models.trunk import Handle, Trunk
from stages.ppo.rollout import shares_trunk


class ActorCritic(nn.Module):
    """Policy and value model as one module with one forward, for one optimiser.

    They are two adapters of one trunk, two trunks, or one trunk and adapter with a value head; in
    the last case one pass serves both. Without a value model it is the policy alone. Dropout stays
    off: log-probs must be those of the rollout.
    """

    def __init__(self, policy: Handle, value: Handle | None) -> None:
        super().__init__()
        self.policy, self.value = policy, value
        self.shared = value is not None and shares_trunk(policy, value)
        self.trunks = nn.ModuleList(self.distinct_trunks())
        for trunk in self.distinct_trunks():
            trunk.freeze()
        for parameter in (*self.policy_parameters(), *self.value_parameters()):
            parameter.requires_grad_(True)

    def distinct_trunks(self) -> list[Trunk]:
        """One or two trunks, each once: wrappers and optimisers see every weight once."""
        handles = [self.policy] if self.value is None else [self.policy, self.value]
        return list({id(handle.trunk): handle.trunk for handle in handles}.values())

    def policy_parameters(self) -> list[nn.Parameter]:
        """The policy's adapter, or all its weights."""
        return self.policy.parameters()

    def value_parameters(self) -> list[nn.Parameter]:
        """The value model's weights that are not the policy's."""
        if self.value is None:
            return []
        policy = {id(parameter) for parameter in self.policy_parameters()}
        return [p for p in self.value.parameters() if id(p) not in policy]

    def forward(
        self,
        batch: TokenBatch,
        want: Collection[str],
        temperature: float = 1.0,
        forbidden: Collection[int] = frozenset(),
    ) -> TrunkOutput:
        """`want` of logprobs, entropy (policy) and values (value model), (B, R) each."""
        if self.value is not None and self.shared:
            return self.value(batch, want, temperature, forbidden)
        out, policy_wants = TrunkOutput(), [name for name in want if name != "values"]
        if policy_wants:
            out = self.policy(batch, policy_wants, temperature, forbidden)
        if "values" in want:
            assert self.value is not None
            out.values = self.value(batch, ["values"]).values
        return out
