"""A run's metrics for Prometheus, through Ray: every node's agent exposes what its processes report."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

STEP = "step"
GAUGES = {
    STEP: "optimizer steps made",
    "reward/mean": "mean reward of a batch's samples",
    "reward/pass_rate": "share of samples that pass every check",
    "reward/zero_advantage_groups": "share of groups whose samples were all rewarded alike",
    "eval/step": "step after which the latest evaluation beside training was begun",
    "eval/pass_rate": "share of held-out prompts that passed in it",
    "loss/total": "weighted sum of the terms",
    "loss/preference": "preference loss, unweighted",
    "loss/demonstration": "demonstration loss, nats per token",
    "loss/adversarial": "adversarial loss, unweighted",
    "loss/kl": "KL loss, unweighted",
    "weight/preference": "coefficient of the preference loss",
    "weight/demonstration": "coefficient of the demonstration loss",
    "weight/adversarial": "coefficient of the adversarial loss",
    "weight/kl": "coefficient of the KL loss",
    "discriminator/gap": "mean score of the expert less that of the policy",
    "discriminator/accuracy": "share of pairs that the discriminator tells apart",
    "expert/nll": "negative log-likelihood of the expert's text, nats per token",
    "entropy/estimate": "entropy of the policy, nats per token",
    "kl/reference": "KL divergence to the reference, nats per token",
    "kl/behaviour": "KL divergence to the policy that sampled, nats per token",
    "importance/ess": "effective sample size, share of tokens",
    "length/sample_mean": "mean length of a sample, tokens",
    "length/truncated": "share of samples that reached the limit of tokens",
    "staleness/mean": "mean age of a token, versions",
    "staleness/max": "largest age of a token, versions",
    "queue/ready": "groups that wait to be used",
    "queue/open": "prompts that are leased",
    "queue/dropped_stale": "groups dropped as too old, in the run so far",
    "queue/dropped_unscored": "groups dropped without a score, in the run so far",
    "queue/dropped_straggler": "prompts dropped as too slow, in the run so far",
    "queue/dropped_lethal": "prompts dropped as ends of engines, in the run so far",
    "queue/expired": "leases that expired, in the run so far",
    "queue/regenerated": "groups made again that could not be scored, in the run so far",
    "queue/skipped_prompts": "bad rows passed over as prompts, in the run so far",
    "queue/skipped_demonstrations": "bad rows passed over as demonstrations, in the run so far",
    "queue/cut_experts": "expert responses cut at data.max_response_tokens, in the run so far",
    "fleet/members": "engines that generate",
    "fleet/lost": "rollout actors lost, in the run so far",
    "fleet/restarts": "rollout actors started again, in the run so far",
    "tokens/generated_per_s": "tokens generated per second",
    "tokens/trained_per_s": "tokens trained on per second",
    "learner/grad_norm": "norm of the gradient before clipping",
    "learner/learning_rate": "learning rate",
    "learner/packing_efficiency": "share of row tokens in use",
    "broadcast/gather_s": "seconds of a broadcast in which layers are gathered",
    "broadcast/send_s": "seconds in which layers are sent, gathering among them",
    "broadcast/pause_s": "seconds until all engines are paused",
    "broadcast/load_s": "seconds until all engines have loaded",
    "time/step": "seconds of a step",
    "time/generate": "seconds of a step in which generation was waited for",
    "time/score": "seconds of a step in which scores were waited for",
    "time/wait": "seconds of a step in which the queue was waited for",
    "time/train": "seconds of a step in which the learner computed",
    "time/evaluate": "seconds of a step in which new weights waited for an evaluation",
    "time/broadcast": "seconds of a step in which weights were sent",
    "time/other": "seconds of a step of anything else",
}
"""Our names, as in metrics.jsonl, of what Prometheus gets; the last value counts."""
COUNTERS = {
    "tokens/generated": "tokens generated for consumed batches",
    "tokens/trained": "tokens trained on",
    "broadcast/bytes": "bytes of weights sent",
}
"""The same, added up over steps."""


class Exporter:
    """What one run reports, labelled with its name. Needs a Ray that this process is connected to.

    Args:
        run: `run.name`.
    """

    def __init__(self, run: str) -> None:
        tags = {"run": run}
        self._gauges = {key: Gauge(_name(key), what, ("run",)).set_default_tags(tags) for key, what in GAUGES.items()}
        self._counters = {
            key: Counter(_name(key), what, ("run",)).set_default_tags(tags) for key, what in COUNTERS.items()
        }

    def export(self, step: int, metrics: dict[str, float]) -> None:
        """Report one step; what is not in GAUGES or COUNTERS stays in the run's folder.

        Args:
            step: optimizer steps made.
            metrics: of this step; one that is missing keeps the value it had.
        """
        for key, value in ({**metrics, STEP: float(step)}).items():
            if key in self._gauges:
                self._gauges[key].set(value)
            elif key in self._counters and value > 0:
                self._counters[key].inc(value)


def prometheus_name(key: str) -> str:
    """What Prometheus calls one of our metrics: Ray puts its name before it, and `_total` after a counter's."""
    return f"ray_{_name(key)}{'_total' if key in COUNTERS else ''}"


def _name(key: str) -> str:
    return "uniapl_" + key.replace("/", "_")
