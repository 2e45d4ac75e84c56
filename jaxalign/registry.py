"""Lazy tables from a registry name to `module:attribute`. Nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError, nearest


@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing. `kind` is the word an error message uses for it."""

    kind: str
    entries: dict[str, str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Any:
        """The object registered under `name`; raises `UserError` with the nearest name."""
        self.check(name)
        module, attribute = self.entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)

    def check(self, name: str) -> None:
        """Raises `UserError` with the nearest name unless `name` is registered."""
        if name not in self.entries:
            known = ", ".join(self.entries)
            raise UserError(
                f"unknown {self.kind} {name!r}{nearest(name, self.entries)}", remedy=f"known: {known}"
            )


# A model family is keyed by the `model_type` of transformers' config.json.
FAMILIES = Registry(
    "model family",
    {
        "llama": "jaxalign.models.llama:FAMILY",
        "mistral": "jaxalign.models.mistral:FAMILY",
        "qwen2": "jaxalign.models.qwen2:FAMILY",
        "qwen3": "jaxalign.models.qwen3:FAMILY",
        "gemma2": "jaxalign.models.gemma2:FAMILY",
        "gemma3_text": "jaxalign.models.gemma3:FAMILY",
    },
)

ADAPTERS = Registry(
    "adapter",
    {
        "lora": "jaxalign.models.adapters:LoraConfig",
        "prefix": "jaxalign.models.prefix:PrefixConfig",
        "prompt": "jaxalign.models.prefix:PromptConfig",
    },
)

OBJECTIVES = Registry(
    "training method",
    {
        "sft": "jaxalign.objectives.sft:SFT",
        "reward": "jaxalign.objectives.reward:BradleyTerry",
        "reward_kwise": "jaxalign.objectives.reward:KWise",
        "reward_rating": "jaxalign.objectives.reward:Rating",
        "cost": "jaxalign.objectives.reward:Cost",
        "dpo": "jaxalign.objectives.pairwise:DPO",
        "cdpo": "jaxalign.objectives.pairwise:ConservativeDPO",
        "robust": "jaxalign.objectives.pairwise:RobustDPO",
        "ipo": "jaxalign.objectives.pairwise:IPO",
        "hinge": "jaxalign.objectives.pairwise:Hinge",
        "exo_pair": "jaxalign.objectives.pairwise:EXO",
        "nca_pair": "jaxalign.objectives.pairwise:NCA",
        "bco_pair": "jaxalign.objectives.pairwise:BCOPair",
        "sppo_hard": "jaxalign.objectives.pairwise:SPPO",
        "apo_zero": "jaxalign.objectives.pairwise:APOZero",
        "apo_down": "jaxalign.objectives.pairwise:APODown",
        "discopop": "jaxalign.objectives.pairwise:DiscoPOP",
        "sigmoid_norm": "jaxalign.objectives.pairwise:SigmoidNorm",
        "fdpo": "jaxalign.objectives.pairwise:FDPO",
        "dpop": "jaxalign.objectives.pairwise:DPOP",
        "odpo": "jaxalign.objectives.pairwise:ODPO",
        "npo": "jaxalign.objectives.pairwise:NPO",
        "slic_hf": "jaxalign.objectives.reference_free:SLiCHF",
        "cpo": "jaxalign.objectives.reference_free:CPO",
        "simpo": "jaxalign.objectives.reference_free:SimPO",
        "alphapo": "jaxalign.objectives.reference_free:AlphaPO",
        "orpo": "jaxalign.objectives.reference_free:ORPO",
        "rpo": "jaxalign.objectives.composite:RPO",
        "rpo_relative": "jaxalign.objectives.relative:RelativeRPO",
        "rpo_relative_unpaired": "jaxalign.objectives.relative:RelativeUnpaired",
        "wpo": "jaxalign.objectives.composite:WPO",
        "ld_dpo": "jaxalign.objectives.composite:LDDPO",
        "mix": "jaxalign.objectives.mix:Mix",
        "mpo": "jaxalign.objectives.mix:MPO",
        "aot": "jaxalign.objectives.transport:AOT",
        "aot_unpaired": "jaxalign.objectives.transport:AOTUnpaired",
        "kto": "jaxalign.objectives.unpaired:KTO",
        "bco": "jaxalign.objectives.unpaired:BCO",
        "apo_zero_unpaired": "jaxalign.objectives.unpaired:APOZeroUnpaired",
        "lipo": "jaxalign.objectives.listwise:LiPO",
        "pro": "jaxalign.objectives.listwise:PRO",
        "rrhf": "jaxalign.objectives.listwise:RRHF",
        "listmle": "jaxalign.objectives.listwise:ListMLE",
        "exo_list": "jaxalign.objectives.listwise:EXOList",
        "d2o": "jaxalign.objectives.listwise:D2O",
        "cringe": "jaxalign.objectives.token_contrastive:Cringe",
        "cringe_pair": "jaxalign.objectives.token_contrastive:CringePair",
    },
)

# Methods that sample answers themselves: an entry is a `jaxalign.rl.base.Method`.
ONLINE = Registry(
    "training method",
    {
        "grpo": "jaxalign.rl.methods:GRPO",
        "rloo": "jaxalign.rl.methods:RLOO",
        "reinforce_pp": "jaxalign.rl.methods:REINFORCE_PP",
        "remax": "jaxalign.rl.methods:REMAX",
        "p3o": "jaxalign.rl.methods:P3O",
        "ppo": "jaxalign.rl.methods:PPO",
        "online_dpo": "jaxalign.rl.methods:ONLINE_DPO",
        "online_ipo": "jaxalign.rl.methods:ONLINE_IPO",
        "steerlm": "jaxalign.rl.iterate:STEERLM",
        "sppo": "jaxalign.rl.iterate:SPPO",
        "online_slic": "jaxalign.rl.methods:ONLINE_SLIC",
        "iterative_dpo": "jaxalign.rl.iterate:ITERATIVE_DPO",
        "raft": "jaxalign.rl.iterate:RAFT",
        "rso": "jaxalign.rl.iterate:RSO",
        "rs_dpo": "jaxalign.rl.iterate:RS_DPO",
        "spin": "jaxalign.rl.iterate:SPIN",
    },
)

METHODS = Registry("training method", OBJECTIVES.entries | ONLINE.entries)  # of `jaxalign train`

REWARDS = Registry(
    "reward",
    {
        "length": "jaxalign.rl.reward_kinds:Length",
        "regex": "jaxalign.rl.reward_kinds:Pattern",
        "exact": "jaxalign.rl.reward_kinds:Exact",
        "json_schema": "jaxalign.rl.reward_kinds:JsonSchema",
        "sentiment": "jaxalign.rl.reward_kinds:Sentiment",
        "python": "jaxalign.rl.reward_kinds:Python",
        "model": "jaxalign.rl.reward_kinds:RewardModelReward",
    },
)

EVALUATIONS = Registry(
    "evaluation",
    {
        "reward": "jaxalign.evals.reward:EVALUATION",
        "best_of_n": "jaxalign.evals.best_of_n:EVALUATION",
        "redteam": "jaxalign.evals.redteam:EVALUATION",
    },
)

BUILDERS = Registry(
    "builder",
    {
        "rlcd": "jaxalign.synth.contrast:RLCD",
        "rlaif": "jaxalign.synth.contrast:RLAIF",
        "cnr": "jaxalign.synth.cnr:BUILDER",
        "self_instruct": "jaxalign.synth.self_instruct:BUILDER",
        "self_align": "jaxalign.synth.self_align:BUILDER",
        "backtranslation": "jaxalign.synth.backtranslation:BUILDER",
        "filter": "jaxalign.synth.filter:BUILDER",
        "safety": "jaxalign.synth.safety:BUILDER",
        "safe_align": "jaxalign.synth.safe_align:BUILDER",
    },
)

# Of `jaxalign evaluate redteam`: functions from a `jaxalign.synth.redteam.base.Setup` to an attack.
ATTACKS = Registry(
    "attack",
    {
        "identity": "jaxalign.synth.redteam.attacks:wrapped",
        "role_wrap": "jaxalign.synth.redteam.attacks:wrapped",
        "few_shot_context": "jaxalign.synth.redteam.attacks:few_shot_context",
        "prefix_seed": "jaxalign.synth.redteam.attacks:wrapped",
        "suffix": "jaxalign.synth.redteam.attacks:wrapped",
        "cou_dialogue": "jaxalign.synth.redteam.attacks:wrapped",
        "goal_hijack": "jaxalign.synth.redteam.attacks:with_canary",
        "prompt_leak": "jaxalign.synth.redteam.attacks:with_canary",
        "decode_sweep": "jaxalign.synth.redteam.attacks:decode_sweep",
        "translate": "jaxalign.synth.redteam.attacks:translate",
        "encode": "jaxalign.synth.redteam.attacks:encode",
        "multi_turn_split": "jaxalign.synth.redteam.attacks:multi_turn_split",
        "search": "jaxalign.synth.redteam.search:search",
    },
)

DEFENCES = Registry(
    "defence",
    {
        "system": "jaxalign.synth.redteam.defences:system",
        "in_context": "jaxalign.synth.redteam.defences:in_context",
        "rewrite": "jaxalign.synth.redteam.defences:rewrite",
    },
)

OPTIMIZERS = Registry(
    "optimizer",
    {name: f"jaxalign.train.optim:{name}" for name in ("adamw", "adafactor", "lion", "sgd")},
)

SCHEDULES = Registry(
    "schedule",
    {name: f"jaxalign.train.optim:{name}" for name in ("cosine", "linear", "constant", "wsd")},
)
